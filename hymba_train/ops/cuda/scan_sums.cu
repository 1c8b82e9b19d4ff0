// Selective scan: sums over chunks and over the partial results of blocks.

// Turn what each chunk adds (carry) into what enters it, in place. One thread a number of a lane's state.
#define MIN_BLOCKS 4
DEVICE void pass_carry(const Params& p, bool reverse) {
  int chain = blockIdx.x / 8, place = blockIdx.x % 8 * 128 + threadIdx.x;  // 8 x 128 = PRIVATE_STATE
  int row = chain / p.blocks, block = chain % p.blocks;
  int warp = place / 256, c = place / 128 % 2, lane = place % 128 / 4, s = place % 4;
  int local = warp * 16 + lane % 8 * 2 + c, channel = block * BLOCK_CHANNELS + local, n = lane / 8 * 4 + s;
  float h = 0.f, a2 = 0.f;
  if (channel < p.channels && n < p.states) {
    long long at = (long long)channel * p.states + n;
    const float* edge = reverse ? p.d_final : p.initial;
    long long row_size = reverse ? (long long)p.channels * p.states : p.initial_row;
    if (edge) h = edge[row * row_size + at];
    a2 = -ex2(p.A_log[at] * LOG2E) * LOG2E;
  }
  for (int k = 0; k < p.chunks; k++) {
    int chunk = reverse ? p.chunks - 1 - k : k;
    long long at = (long long)(chunk * p.batch + row) * p.blocks + block;
    float added = p.carry[at * PRIVATE_STATE + place], total = p.sum_delta[at * BLOCK_CHANNELS + local];
    p.carry[at * PRIVATE_STATE + place] = h;
    h = (p.keep[chunk * p.batch + row] ? ex2(a2 * total) * h : 0.f) + added;
  }
}
KERNEL(scan_pass_states) { pass_carry(p, false); }
KERNEL(scan_pass_gradients) { pass_carry(p, true); }

// dB, dC: the sum over blocks of channels. A thread has 4 numbers of a token's 32.
DEVICE void sum_bc(const Params& p, long long index) {
  long long rows = (long long)p.batch * p.tokens, row = index / 8;
  int quarter = index % 8, n = quarter % 4 * 4;
  if (row >= rows) return;
  const float4* from = (const float4*)p.part_bc + index;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 5
  for (int k = 0; k < p.blocks; k++) {
    float4 x = from[k * rows * 8];
    total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
  }
  BCElement* to = (BCElement*)(quarter < 4 ? p.dB : p.dC) + row * p.states + n;
  if (n < p.states) to[0] = bc_element(total.x);
  if (n + 1 < p.states) to[1] = bc_element(total.y);
  if (n + 2 < p.states) to[2] = bc_element(total.z);
  if (n + 3 < p.states) to[3] = bc_element(total.w);
}

// Gradients to A_log, D, the bias and the initial state: sums over rows and chunks.
DEVICE void sum_weights(const Params& p, long long e) {
  long long size = (long long)p.channels * p.states;
  int parts = p.batch * p.chunks;
  if (e < p.channels) {
    float dD = 0.f, dbias = 0.f;
    for (int k = 0; k < parts; k++) {
      dD += p.part_D[(long long)k * p.channels + e];
      dbias += p.part_bias[(long long)k * p.channels + e];
    }
    p.dD[e] = dD, p.dbias[e] = dbias;
  }
  if (e >= size) return;
  float dA = 0.f;
#pragma unroll 4
  for (int k = 0; k < parts; k++) dA += p.part_A[k * size + e];
  p.dA_log[e] = -ex2(p.A_log[e] * LOG2E) * dA;
  if (!p.d_initial_out) return;
  float all = 0.f;
  for (int row = 0; row < p.batch; row++) {
    float d = p.d_initial[row * size + e];
    if (p.d_reset)
      for (int k = 0; k < p.chunks; k++) d += p.d_reset[(row * p.chunks + k) * size + e];
    if (p.initial_row) p.d_initial_out[row * size + e] = d;
    all += d;
  }
  if (!p.initial_row) p.d_initial_out[e] = all;
}

KERNEL(scan_sum) {
  long long bc_blocks = ((long long)p.batch * p.tokens * 8 + 127) / 128;
  if (blockIdx.x < bc_blocks) {
    sum_bc(p, (long long)blockIdx.x * 128 + threadIdx.x);
  } else {
    sum_weights(p, ((long long)blockIdx.x - bc_blocks) * 128 + threadIdx.x);
  }
}
#undef MIN_BLOCKS
