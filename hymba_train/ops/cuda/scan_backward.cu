// Selective scan, backward: scan_backward.
//
// Tiles of 16 steps, last first. Per tile: the states before every window of WINDOW steps are computed anew from the
// checkpoint (hold); then, last window first, the decays a and a h_{t-1} of its steps go to registers and the gradient
// g to the state runs back over them. After 4 steps (a quad) each lane finishes one token of its two channels.
// A warp's 16 channels are its own throughout; its warps share B, C and the sums over channels.

constexpr int WINDOW = BACKWARD_WINDOW, WINDOWS = TILE / WINDOW;
constexpr int SLOTS = WARPS * 2, PART_TOKEN = 36, PART_SLOT = TILE * PART_TOKEN + 16;  // strides without bank conflicts

struct BackwardShared {
  float* records;  // [token][pair] {delta 0, delta 1, delta u 0, delta u 1}
  float* dy;       // [token][pair] gradient to the sum before the gate
  float* slope;    // [token][pair] sigmoid of the raw time step
  float* bc;       // [token][32]
  float* hold;     // [window][c][thread] float4: states before each window
  float* sums;     // [step of the quad][thread] {g B of channel 0, 1, q a2 of channel 0, 1}: sums over a lane's states
  float* parts;    // [warp, half][token][36]: partial dB, dC
  float* pairs;    // [pair] float4 {bias 0, 1, D 0, 1}
  float* d_skip;   // [thread] float2: sums of the gradients to D over the thread's items
  DEVICE explicit BackwardShared(float* base) {
    records = base;
    dy = records + TILE * PAIRS * 4;
    slope = dy + TILE * PAIRS * 2;
    bc = slope + TILE * PAIRS * 2;
    hold = bc + TILE * 32;
    sums = hold + (WINDOWS - 1) * 1024;
    parts = sums + QUAD * 512;
    pairs = parts + SLOTS * PART_SLOT;
    d_skip = pairs + PAIRS * 4;
  }
  static constexpr int ITEMS = TILE * (PAIRS * 8 + 32) + PAIRS * 4 + 256;
  static constexpr int FLOATS = ITEMS + (WINDOWS - 1) * 1024 + QUAD * 512 + SLOTS * PART_SLOT;
};
static_assert(BackwardShared::FLOATS * 4 == SCAN_BACKWARD_SHARED, "shared memory of scan_backward");

// d += X (16 rows of states x 8 channels, twice) times b (channels x 4 tokens x 2 halves): see the lane layout.
// With float32 activations each number is split in two, so that the sum keeps float32's digits.
DEVICE void add_outer(float (&d)[2][4], const float (&x)[8], float b0, float b1) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    float a0 = x[2 * j], a1 = x[2 * j + 1], a2 = x[4 + 2 * j], a3 = x[5 + 2 * j];
#if X_BF16
    mma_tf32(d[j], a0, a1, a2, a3, b0, b1);
#else
    const unsigned top = 0xffffe000u;
    float c0 = from_bits(to_bits(a0) & top), c1 = from_bits(to_bits(a1) & top), c2 = from_bits(to_bits(a2) & top);
    float c3 = from_bits(to_bits(a3) & top), e0 = from_bits(to_bits(b0) & top), e1 = from_bits(to_bits(b1) & top);
    mma_tf32(d[j], a0 - c0, a1 - c1, a2 - c2, a3 - c3, e0, e1);
    mma_tf32(d[j], c0, c1, c2, c3, b0 - e0, b1 - e1);
    mma_tf32(d[j], c0, c1, c2, c3, e0, e1);
#endif
  }
}

struct BackwardState {
  float a2[8], g[8], dA[8];
};

struct OuterSums {
  float dB[2][4], dC[2][4];
};

// The window of steps base + offset .. from the state h before it; base: first of its quad.
template <bool RESET>
DEVICE void backward_window(const Params& p, const Place& at, const BackwardShared& shared, int base, int offset,
                            unsigned starts, float (&h)[8], BackwardState& state, OuterSums& outer) {
  float a[WINDOW][8], kept[WINDOW][8], delta[4], B[4];
  float2 dy[WINDOW];
  const float* bc = shared.bc + base * 32 + at.sg * 4;
#pragma unroll
  for (int t = 0; t < WINDOW; t++) {
    int step = offset + t, pair = (base + step) * PAIRS + at.pair;
    if (RESET && (starts >> (base + step) & 1)) load_state(p, at, row_initial(p, at), h);
    unpack4(shared.records + pair * 4, delta);
    unpack4(bc + step * 32, B);
    dy[t] = *(const float2*)(shared.dy + pair * 2);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      a[t][i] = ex2(delta[i / 4] * state.a2[i]);
      kept[t][i] = a[t][i] * h[i];
      h[i] = fmaf(B[i % 4], delta[2 + i / 4], kept[t][i]);
    }
    add_outer(outer.dC, h, at.sg == step ? dy[t].x : 0.f, at.sg == step ? dy[t].y : 0.f);
  }
#pragma unroll
  for (int t = WINDOW - 1; t >= 0; t--) {
    int step = offset + t;
    float C[4], sb[2] = {0.f, 0.f}, sa[2] = {0.f, 0.f};
    unpack4(bc + step * 32 + 16, C);
    unpack4(bc + step * 32, B);  // again: to keep them would take registers that are not there
    unpack4(shared.records + ((base + step) * PAIRS + at.pair) * 4, delta);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      state.g[i] = fmaf(C[i % 4], i / 4 ? dy[t].y : dy[t].x, state.g[i]);
      sb[i / 4] = fmaf(B[i % 4], state.g[i], sb[i / 4]);
    }
    add_outer(outer.dB, state.g, at.sg == step ? delta[2] : 0.f, at.sg == step ? delta[3] : 0.f);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float q = state.g[i] * kept[t][i];  // gradient to delta A
      state.g[i] *= a[t][i];
      state.dA[i] = fmaf(delta[i / 4], q, state.dA[i]);
      sa[i / 4] = fmaf(state.a2[i], q, sa[i / 4]);
    }
    if (RESET && (starts >> (base + step) & 1)) {
      const long long size = (long long)p.channels * p.states;
      if (p.d_reset) store_state(p, at, p.d_reset + (at.row * p.chunks + at.chunk) * size, state.g, true);
      for (int i = 0; i < 8; i++) state.g[i] = 0.f;
    }
    *(float4*)(shared.sums + (step * 128 + threadIdx.x) * 4) = make_float4(sb[0], sb[1], sa[0], sa[1]);
  }
}

// Column 2 t + half of the products: of a row only the columns of its own half of the channels count.
DEVICE void store_parts(const Place& at, const BackwardShared& shared, int base, const OuterSums& outer) {
  const float(&dB)[2][4] = outer.dB, (&dC)[2][4] = outer.dC;
  int half = at.lane >> 2 & 1;
  float* part = shared.parts + (at.warp * 2 + half) * PART_SLOT + (base + at.lane % 4) * PART_TOKEN + at.sg * 4;
  *(float4*)part = half ? make_float4(dB[0][1], dB[0][3], dB[1][1], dB[1][3])
                        : make_float4(dB[0][0], dB[0][2], dB[1][0], dB[1][2]);
  *(float4*)(part + 16) = half ? make_float4(dC[0][1], dC[0][3], dC[1][1], dC[1][3])
                               : make_float4(dC[0][0], dC[0][2], dC[1][0], dC[1][2]);
}

// States before every window but the first into hold, from that before it; h ends as the last of them.
template <bool RESET>
DEVICE void hold_states(const Params& p, const Place& at, const BackwardShared& shared, unsigned starts,
                        const float (&a2)[8], float (&h)[8]) {
#pragma unroll HOLD_UNROLL
  for (int w = 0; w < WINDOWS - 1; w++) {
    store_private(shared.hold + w * 1024 + at.warp * 256 + at.lane * 4, h);
#pragma unroll
    for (int t = w * WINDOW; t < (w + 1) * WINDOW; t++) {
      if (RESET && (starts >> t & 1)) load_state(p, at, row_initial(p, at), h);
      float delta[4], B[4];
      unpack4(shared.records + (t * PAIRS + at.pair) * 4, delta);
      unpack4(shared.bc + t * 32 + at.sg * 4, B);
#pragma unroll
      for (int i = 0; i < 8; i++) h[i] = fmaf(B[i % 4], delta[2 + i / 4], ex2(delta[i / 4] * a2[i]) * h[i]);
    }
  }
}

template <bool RESET>
DEVICE void backward_quad(const Params& p, const Place& at, const BackwardShared& shared, int base, unsigned starts,
                          float (&h)[8], BackwardState& state) {
  OuterSums outer = {};
#pragma unroll
  for (int offset = QUAD - WINDOW; offset >= 0; offset -= WINDOW) {
    if (base + offset < TILE - WINDOW) {
      const float* from = shared.hold + (base + offset) / WINDOW * 1024 + at.warp * 256 + at.lane * 4;
      for (int c = 0; c < 2; c++)
        for (int s = 0; s < 4; s++) h[c * 4 + s] = from[c * 128 + s];
    }
    backward_window<RESET>(p, at, shared, base, offset, starts, h, state, outer);
  }
  store_parts(at, shared, base, outer);
}

struct BackwardItems {
  Pair u[QUADS], dt[QUADS], z[QUADS], dy[QUADS], before[QUADS];

  DEVICE void load(const Params& p, const Place& at, int first) {
    load_items_at(p, at, first, p.u, p.u_row, p.u_token, ZERO, u);
    load_items_at(p, at, first, p.dt, p.dt_row, p.dt_token, NO_TIME, dt);
    load_items_at(p, at, first, p.z, p.z_row, p.z_token, ZERO, z);
    load_items_at(p, at, first, p.dy, p.dy_row, p.dy_token, ZERO, dy);
    load_items_at(p, at, first, p.before, (long long)p.tokens * p.channels, p.channels, ZERO, before);
  }
};

// What is needed once a tile or quad lies in shared memory, for want of registers: see pairs and d_skip.
DEVICE void open_sums(const Params& p, const Place& at, const BackwardShared& shared) {
  float bias[2], skip[2];
  load_channels(p, at, p.bias, bias), load_channels(p, at, p.D, skip);
  if (at.sg == 0) *(float4*)(shared.pairs + at.pair * 4) = make_float4(bias[0], bias[1], skip[0], skip[1]);
  *(float2*)(shared.d_skip + threadIdx.x * 2) = make_float2(0.f, 0.f);
  sync_warp();
}

DEVICE void close_sums(const Params& p, const Place& at, const BackwardShared& shared, const float (&d_bias)[2]) {
  const long long to = (long long)(at.row * p.chunks + at.chunk) * p.channels + at.channel;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    float D = sum_tokens(shared.d_skip[threadIdx.x * 2 + c]), bias = sum_tokens(d_bias[c]);
    if (at.sg == 0 && (EXACT || at.channel + c < p.channels)) p.part_D[to + c] = D, p.part_bias[to + c] = bias;
  }
}

// Before the steps of a tile: what they need of each item goes to shared memory; dz is done.
DEVICE void open_items(const Params& p, const Place& at, const BackwardShared& shared, int first,
                       const BackwardItems& items) {
  float2 bias = *(const float2*)(shared.pairs + at.pair * 4);
  float2 d_skip = *(const float2*)(shared.d_skip + threadIdx.x * 2);
  Element* out = (Element*)p.dz + ((long long)at.row * p.tokens + first + at.sg) * p.dz_token + at.channel;
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    float2 u = unpack(items.u[i]), dt = unpack(items.dt[i]), z = unpack(items.z[i]), dy = unpack(items.dy[i]);
    float2 before = unpack(items.before[i]), to_sum, slopes;
    float4 record;
    float dz[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float x = c ? dt.y + bias.y : dt.x + bias.x, zc = c ? z.y : z.x, uc = c ? u.y : u.x, q;
      float delta = softplus(x, q), inverse = reciprocal(1.f + q), gate = sigmoid(zc);
      float through = (c ? dy.y : dy.x) * gate, gated = through * zc;
      (c ? record.y : record.x) = delta, (c ? record.w : record.z) = delta * uc;
      (c ? to_sum.y : to_sum.x) = gated;
      (c ? slopes.y : slopes.x) = x < 0.f ? q * inverse : inverse;
      dz[c] = (through + fmaf(-gated, gate, gated)) * (c ? before.y : before.x);
      (c ? d_skip.y : d_skip.x) = fmaf(gated, uc, c ? d_skip.y : d_skip.x);
    }
    int place = (i * QUAD + at.sg) * PAIRS + at.pair;
    *(float4*)(shared.records + place * 4) = record;
    *(float2*)(shared.dy + place * 2) = to_sum;
    *(float2*)(shared.slope + place * 2) = slopes;
    if (first + i * QUAD + at.sg < at.last) store_pair(out, 0, at.channel, p.channels, pack(dz[0], dz[1]));
    out += QUAD * p.dz_token;
  }
  *(float2*)(shared.d_skip + threadIdx.x * 2) = d_skip;
}

// After the steps of a quad: du and ddt of the lane's item.
DEVICE void close_item(const Params& p, const Place& at, const BackwardShared& shared, int base, Pair raw_u,
                       long long out, bool valid, float (&d_bias)[2]) {
  const int place = (base + at.sg) * PAIRS + at.pair;
  const float* from = shared.sums + (at.sg * 128 + at.warp * 32 + at.cg) * 4;
  float sum[4];
  unpack4(from, sum);
#pragma unroll
  for (int k = 1; k < 4; k++) {
    float more[4];
    unpack4(from + k * 32, more);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] += more[j];
  }
  float2 u = unpack(raw_u), to_sum = *(const float2*)(shared.dy + place * 2);
  float4 record = *(const float4*)(shared.records + place * 4);
  float2 slopes = *(const float2*)(shared.slope + place * 2);
  float2 skip = *(const float2*)(shared.pairs + at.pair * 4 + 2);
  float r0 = fmaf(u.x, sum[0], LN2 * sum[2]) * slopes.x, r1 = fmaf(u.y, sum[1], LN2 * sum[3]) * slopes.y;
  if (!valid) return;
  d_bias[0] += r0, d_bias[1] += r1;
  store_pair(p.du, out, at.channel, p.channels,
             pack(fmaf(skip.x, to_sum.x, record.x * sum[0]), fmaf(skip.y, to_sum.y, record.y * sum[1])));
  store_pair(p.ddt, out, at.channel, p.channels, pack(r0, r1));
}

// This block's share of dB and dC of a tile.
DEVICE void sum_parts(const Params& p, const Place& at, const BackwardShared& shared, int first) {
  int token = threadIdx.x / 8, quarter = threadIdx.x % 8;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int slot = 0; slot < SLOTS; slot++) {
    float4 x = *(const float4*)(shared.parts + slot * PART_SLOT + token * PART_TOKEN + quarter * 4);
    total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
  }
  if (first + token < at.last)
    ((float4*)p.part_bc)[(((long long)at.block * p.batch + at.row) * p.tokens + first + token) * 8 + quarter] = total;
}

#define MIN_BLOCKS BACKWARD_BLOCKS
KERNEL(scan_backward) {
  SHARED(memory);
  BackwardShared shared(memory);
  Place at;
  at.set(p, next_unit(p, memory), true);
  BackwardState state;
  load_A(p, at, state.a2);
  for (int i = 0; i < 8; i++) state.dA[i] = 0.f;
  float d_bias[2] = {0.f, 0.f};
  const long long state_size = (long long)p.channels * p.states;
  int first = at.first + (at.last - at.first - 1) / TILE * TILE;
  BackwardItems next;
  TileRows rows;
  next.load(p, at, first);
  rows.load(p, at, first);
  open_sums(p, at, shared);
  await_neighbour(p, at);
  if (at.order) {
    load_private(p.carry + at.carry(p, p.chained ? 0 : at.chunk), state.g);
  } else {
    load_state(p, at, p.d_final ? p.d_final + at.row * state_size : nullptr, state.g);
  }
#pragma unroll 1
  for (; first >= at.first; first -= TILE) {
    float h[8];
    load_private(p.checkpoints + at.carry(p, first / TILE), h);
    open_items(p, at, shared, first, next);
    Pair u[QUADS];  // u[QUADS - 1] is that of the quad at work
#pragma unroll
    for (int i = 0; i < QUADS; i++) u[i] = next.u[i];
    rows.store(shared.bc);
    unsigned starts = vote(rows.start);
    sync_block();
    if (first > at.first) {
      const float* checkpoint = p.checkpoints + at.carry(p, first / TILE - 1);
      prefetch(checkpoint), prefetch(checkpoint + 128);
      next.load(p, at, first - TILE);
      rows.load(p, at, first - TILE);
    }
    if (starts) {
      hold_states<true>(p, at, shared, starts, state.a2, h);
    } else {
      hold_states<false>(p, at, shared, starts, state.a2, h);
    }
#pragma unroll 1
    for (int base = TILE - QUAD; base >= 0; base -= QUAD) {
      if (starts >> base & 15) {
        backward_quad<true>(p, at, shared, base, starts, h, state);
      } else {
        backward_quad<false>(p, at, shared, base, starts, h, state);
      }
      sync_warp();
      int token = first + base + at.sg;
      long long out = ((long long)at.row * p.tokens + token) * p.channels + at.channel;
      close_item(p, at, shared, base, u[QUADS - 1], out, token < at.last, d_bias);
#pragma unroll
      for (int i = QUADS - 1; i > 0; i--) u[i] = u[i - 1];
      sync_warp();
    }
    sync_block();
    sum_parts(p, at, shared, first);
  }
  if (p.chained && !at.is_last(p)) {
    store_private(p.carry + at.carry(p, 0), state.g);
    tell_neighbour(p, at);
  }
  store_state(p, at, p.part_A + (at.row * p.chunks + at.chunk) * state_size, state.dA, false);
  if (at.chunk == 0 && p.d_initial) store_state(p, at, p.d_initial + at.row * state_size, state.g, false);
  close_sums(p, at, shared, d_bias);
}

#undef MIN_BLOCKS
