// Selective scan, backward: scan_backward.
//
// Tiles of 16 steps, last first. Per tile: the states before every 4th step are computed anew from the checkpoint
// (hold), then, last window first, the decays a and a h_{t-1} of its 4 steps go to registers and the gradient g to
// the state runs back over them.

constexpr int SLOTS = WARPS * 2, PART_TOKEN = 36, PART_SLOT = TILE * PART_TOKEN + 16;  // strides without bank conflicts
constexpr int RESULT = TILE * Y_STRIDE;

struct BackwardShared {
  float* records;  // [token][pair] {delta 0, delta 1, delta u 0, delta u 1}
  float* dy;       // [token][pair] gradient to the sum before the gate
  float* bc;       // [token][32]
  float* hold;     // [window][c][thread] float4: states before each window
  float* results;  // [sum over states of g B | of q a2][token][Y_STRIDE]
  float* parts;    // [warp, half][token][36]: partial dB, dC
  float* slope;    // [ITEMS][thread] float2: sigmoid of the raw time step
  DEVICE explicit BackwardShared(float* base) {
    records = base;
    dy = records + TILE * PAIRS * 4;
    bc = dy + TILE * PAIRS * 2;
    hold = bc + TILE * 32;
    results = hold + (WINDOWS - 1) * 2 * 128 * 4;
    parts = results + 2 * RESULT;
    slope = parts + SLOTS * PART_SLOT;
  }
  static constexpr int FLOATS = TILE * (PAIRS * 6 + 32) + (WINDOWS - 1) * 1024 + 2 * RESULT + SLOTS * PART_SLOT + ITEMS * 256;
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

// The window of steps base .. base + 3 from the state h before it.
template <bool RESET>
DEVICE void backward_window(const Params& p, const Place& at, const BackwardShared& shared, int base, unsigned starts,
                            const float* initial, float* reset, float (&h)[8], BackwardState& state) {
  float a[WINDOW][8], kept[WINDOW][8], dC[2][4] = {}, dB[2][4] = {};
  const float* my_records = shared.records + (at.warp * 8 + at.cg) * 4;
  const float* my_dy = shared.dy + (at.warp * 8 + at.cg) * 2;
  const int mine = at.warp * 16 + at.cg * 2 + at.sg % 2;
#pragma unroll
  for (int t = 0; t < WINDOW; t++) {
    if (RESET && (starts >> (base + t) & 1)) load_state(p, at, initial, h);
    float delta[4], B[4];
    unpack4(my_records + (base + t) * PAIRS * 4, delta);
    unpack4(shared.bc + (base + t) * 32 + at.sg * 4, B);
    float2 dy = *(const float2*)(my_dy + (base + t) * PAIRS * 2);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      a[t][i] = ex2(delta[i / 4] * state.a2[i]);
      kept[t][i] = a[t][i] * h[i];
      h[i] = fmaf(B[i % 4], delta[2 + i / 4], kept[t][i]);
    }
    add_outer(dC, h, at.sg == t ? dy.x : 0.f, at.sg == t ? dy.y : 0.f);
  }
  float sums_b[2], sums_a[2];
#pragma unroll
  for (int t = WINDOW - 1; t >= 0; t--) {
    float delta[4], B[4], C[4], sb[2] = {0.f, 0.f}, sa[2] = {0.f, 0.f};
    unpack4(my_records + (base + t) * PAIRS * 4, delta);
    unpack4(shared.bc + (base + t) * 32 + at.sg * 4, B);
    unpack4(shared.bc + (base + t) * 32 + 16 + at.sg * 4, C);
    float2 dy = *(const float2*)(my_dy + (base + t) * PAIRS * 2);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      state.g[i] = fmaf(C[i % 4], i / 4 ? dy.y : dy.x, state.g[i]);
      sb[i / 4] = fmaf(B[i % 4], state.g[i], sb[i / 4]);
    }
    add_outer(dB, state.g, at.sg == t ? delta[2] : 0.f, at.sg == t ? delta[3] : 0.f);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float q = state.g[i] * kept[t][i];  // gradient to delta A
      state.g[i] *= a[t][i];
      state.dA[i] = fmaf(delta[i / 4], q, state.dA[i]);
      sa[i / 4] = fmaf(state.a2[i], q, sa[i / 4]);
    }
    if (RESET && (starts >> (base + t) & 1)) {
      if (reset) store_state(p, at, reset, state.g, true);
      for (int i = 0; i < 8; i++) state.g[i] = 0.f;
    }
    sums_b[t % 2] = halve(sb[0], sb[1], at.lane, 8);
    sums_a[t % 2] = halve(sa[0], sa[1], at.lane, 8);
    if (t % 2 == 0) {
      float* to = shared.results + (base + t + at.sg / 2) * Y_STRIDE + mine;
      to[0] = halve(sums_b[0], sums_b[1], at.lane, 16);
      to[RESULT] = halve(sums_a[0], sums_a[1], at.lane, 16);
    }
  }
  // Column 2 t + half of the products: of a row only the columns of its own half of the channels count.
  int half = at.lane >> 2 & 1;
  float* part = shared.parts + (at.warp * 2 + half) * PART_SLOT + (base + at.lane % 4) * PART_TOKEN + at.sg * 4;
  *(float4*)part = half ? make_float4(dB[0][1], dB[0][3], dB[1][1], dB[1][3])
                        : make_float4(dB[0][0], dB[0][2], dB[1][0], dB[1][2]);
  *(float4*)(part + 16) = half ? make_float4(dC[0][1], dC[0][3], dC[1][1], dC[1][3])
                               : make_float4(dC[0][0], dC[0][2], dC[1][0], dC[1][2]);
}

// States before windows 1 .. 3 into hold, from that before window 0; h ends as the last of them.
template <bool RESET>
DEVICE void hold_states(const Params& p, const Place& at, const BackwardShared& shared, unsigned starts,
                        const float* initial, const float (&a2)[8], float (&h)[8]) {
  for (int w = 0; w < WINDOWS - 1; w++) {
    store_private(shared.hold + w * 1024 + at.warp * 256 + at.lane * 4, h);
#pragma unroll
    for (int t = w * WINDOW; t < (w + 1) * WINDOW; t++) {
      if (RESET && (starts >> t & 1)) load_state(p, at, initial, h);
      float delta[4], B[4];
      unpack4(shared.records + (t * PAIRS + at.warp * 8 + at.cg) * 4, delta);
      unpack4(shared.bc + t * 32 + at.sg * 4, B);
#pragma unroll
      for (int i = 0; i < 8; i++) h[i] = fmaf(B[i % 4], delta[2 + i / 4], ex2(delta[i / 4] * a2[i]) * h[i]);
    }
  }
}

template <bool RESET>
DEVICE void backward_steps(const Params& p, const Place& at, const BackwardShared& shared, unsigned starts,
                           const float* initial, float* reset, float (&h)[8], BackwardState& state) {
  hold_states<RESET>(p, at, shared, starts, initial, state.a2, h);
#pragma unroll 1
  for (int w = WINDOWS - 1; w >= 0; w--) {
    if (w < WINDOWS - 1) {
      const float* from = shared.hold + w * 1024 + at.warp * 256 + at.lane * 4;
      for (int c = 0; c < 2; c++)
        for (int s = 0; s < 4; s++) h[c * 4 + s] = from[c * 128 + s];
    }
    backward_window<RESET>(p, at, shared, w * WINDOW, starts, initial, reset, h, state);
  }
}

// What a tile needs from B, C and the documents: a thread loads 4 numbers of the 16 x 32.
struct TileRows {
  Quarter bc;
  bool start;

  DEVICE void load(const Params& p, const Place& at, int first) {
    int token = first + threadIdx.x / 8;
    bc.load(p, at.row, token, threadIdx.x % 8, token < at.last);
    start = document_starts(p, at, first, at.lane);
  }
  DEVICE void store(float* bc_shared) const { bc.store(bc_shared + threadIdx.x * 4); }  // [token][B 16 | C 16]
};

struct BackwardItems {
  Pair u[ITEMS], dt[ITEMS], z[ITEMS], dy[ITEMS], before[ITEMS];
};
struct BackwardStreams {  // `load` moves on to the tile before
  Stream u, dt, z, dy, before;

  DEVICE void set(const Params& p, const Place& at, int first) {
    int token = first + at.warp;
    u.set(p.u, at.row * p.u_row, p.u_token, token, at.item);
    dt.set(p.dt, at.row * p.dt_row, p.dt_token, token, at.item);
    z.set(p.z, at.row * p.z_row, p.z_token, token, at.item);
    dy.set(p.dy, at.row * p.dy_row, p.dy_token, token, at.item);
    before.set(p.before, (long long)at.row * p.tokens * p.channels, p.channels, token, at.item);
  }
  DEVICE void load(const Params& p, const Place& at, int first, BackwardItems& items) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      bool valid = first + i * WARPS + at.warp < at.last;
      items.u[i] = u.load(i, at.item, p.channels, valid);
      items.dt[i] = dt.load(i, at.item, p.channels, valid);
      items.z[i] = z.load(i, at.item, p.channels, valid);
      items.dy[i] = dy.load(i, at.item, p.channels, valid);
      items.before[i] = before.load(i, at.item, p.channels, valid);
    }
    u.move(-1), dt.move(-1), z.move(-1), dy.move(-1), before.move(-1);
  }
};

#define MIN_BLOCKS BACKWARD_BLOCKS
KERNEL(scan_backward) {
  SHARED(memory);
  BackwardShared shared(memory);
  Place at;
  at.set(p, next_unit(p, memory), true);
  BackwardState state;
  load_A(p, at, state.a2);
  for (int i = 0; i < 8; i++) state.dA[i] = 0.f;
  float bias[2], skip[2], d_skip[2] = {0.f, 0.f}, d_bias[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < 2; c++) {
    bias[c] = at.item + c < p.channels ? p.bias[at.item + c] : 0.f;
    skip[c] = at.item + c < p.channels ? p.D[at.item + c] : 0.f;
  }
  const long long state_size = (long long)p.channels * p.states;
  const float* initial = p.initial ? p.initial + at.row * p.initial_row : nullptr;
  float* reset = p.d_reset ? p.d_reset + (at.row * p.chunks + at.chunk) * state_size : nullptr;
  int first = at.first + (at.last - at.first - 1) / TILE * TILE;
  BackwardItems next;
  BackwardStreams streams;
  TileRows rows;
  streams.set(p, at, first);
  streams.load(p, at, first, next);
  rows.load(p, at, first);
  await_neighbour(p, at);
  if (at.order) {
    load_private(p.carry + at.carry(p, p.chained ? 0 : at.chunk), state.g);
  } else {
    load_state(p, at, p.d_final ? p.d_final + at.row * state_size : nullptr, state.g);
  }
  const long long out_step = (long long)WARPS * p.channels;  // the same for du and ddt
  long long out = ((long long)at.row * p.tokens + first + at.warp) * p.channels + at.item;
#pragma unroll 1
  for (; first >= at.first; first -= TILE, out -= ITEMS * out_step) {
    float h[8];
    load_private(p.checkpoints + at.carry(p, first / TILE), h);
    Pair raw_u[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      int token = i * WARPS + at.warp;
      bool valid = first + token < at.last;
      raw_u[i] = next.u[i];
      float2 u = unpack(next.u[i]), dt = unpack(next.dt[i]), z = unpack(next.z[i]), dy = unpack(next.dy[i]);
      float2 before = unpack(next.before[i]), to_sum, slopes;
      float4 record;
      float dz[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float x = (c ? dt.y : dt.x) + bias[c], zc = c ? z.y : z.x, dyc = c ? dy.y : dy.x, q;
        float delta = softplus(x, q), inverse = reciprocal(1.f + q), gate = sigmoid(zc);
        float slope = valid ? (x < 0.f ? q * inverse : inverse) : 0.f;
        delta = valid ? delta : 0.f;
        float through = dyc * gate;
        (c ? record.y : record.x) = delta, (c ? record.w : record.z) = delta * (c ? u.y : u.x);
        (c ? to_sum.y : to_sum.x) = through * zc;
        (c ? slopes.y : slopes.x) = slope;
        dz[c] = through * fmaf(zc, 1.f - gate, 1.f) * (c ? before.y : before.x);
        d_skip[c] = fmaf(through * zc, c ? u.y : u.x, d_skip[c]);
      }
      *(float4*)(shared.records + (token * PAIRS + at.lane) * 4) = record;
      *(float2*)(shared.dy + (token * PAIRS + at.lane) * 2) = to_sum;
      *(float2*)(shared.slope + (i * 128 + threadIdx.x) * 2) = slopes;
      if (valid) {
        long long place = ((long long)at.row * p.tokens + first + token) * p.dz_token + at.item;
        store_pair(p.dz, place, at.item, p.channels, pack(dz[0], dz[1]));
      }
    }
    rows.store(shared.bc);
    unsigned starts = vote(rows.start);
    sync_block();
    if (first > at.first) {
      const float* checkpoint = p.checkpoints + at.carry(p, first / TILE - 1);
      prefetch(checkpoint), prefetch(checkpoint + 128);
      streams.load(p, at, first - TILE, next);
      rows.load(p, at, first - TILE);
    }
    if (starts) {
      backward_steps<true>(p, at, shared, starts, initial, reset, h, state);
    } else {
      backward_steps<false>(p, at, shared, starts, initial, reset, h, state);
    }
    sync_block();
    {  // this block's share of dB and dC
      int token = threadIdx.x / 8;
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int slot = 0; slot < SLOTS; slot++) {
        float4 x = *(const float4*)(shared.parts + slot * PART_SLOT + token * PART_TOKEN + threadIdx.x % 8 * 4);
        total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
      }
      if (first + token < at.last)
        ((float4*)p.part_bc)[(((long long)at.block * p.batch + at.row) * p.tokens + first + token) * 8 + threadIdx.x % 8] = total;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      int token = i * WARPS + at.warp;
      if (first + token >= at.last) continue;
      float2 u = unpack(raw_u[i]), to_sum = *(const float2*)(shared.dy + (token * PAIRS + at.lane) * 2);
      float4 record = *(const float4*)(shared.records + (token * PAIRS + at.lane) * 4);
      float2 slopes = *(const float2*)(shared.slope + (i * 128 + threadIdx.x) * 2);
      const float* result = shared.results + token * Y_STRIDE + at.lane * 2;
      float2 sb = *(const float2*)result, sa = *(const float2*)(result + RESULT);
      float r0 = fmaf(u.x, sb.x, LN2 * sa.x) * slopes.x, r1 = fmaf(u.y, sb.y, LN2 * sa.y) * slopes.y;
      d_bias[0] += r0, d_bias[1] += r1;
      long long place = out + i * out_step;
      store_pair(p.du, place, at.item, p.channels,
                 pack(fmaf(skip[0], to_sum.x, record.x * sb.x), fmaf(skip[1], to_sum.y, record.y * sb.y)));
      store_pair(p.ddt, place, at.item, p.channels, pack(r0, r1));
    }
  }
  if (p.chained && !at.is_last(p)) {
    store_private(p.carry + at.carry(p, 0), state.g);
    tell_neighbour(p, at);
  }
  const long long part = at.row * p.chunks + at.chunk;
  store_state(p, at, p.part_A + part * state_size, state.dA, false);
  if (at.chunk == 0 && p.d_initial) store_state(p, at, p.d_initial + at.row * state_size, state.g, false);
  sync_block();
  float* sums = shared.results;  // [dD | dbias][warp][channel]
  *(float2*)(sums + at.warp * 64 + at.lane * 2) = make_float2(d_skip[0], d_skip[1]);
  *(float2*)(sums + 256 + at.warp * 64 + at.lane * 2) = make_float2(d_bias[0], d_bias[1]);
  sync_block();
  int channel = threadIdx.x % 64, which = threadIdx.x / 64, c = at.block * BLOCK_CHANNELS + channel;
  const float* from = sums + which * 256 + channel;
  if (c < p.channels)
    (which ? p.part_bias : p.part_D)[part * p.channels + c] = from[0] + from[64] + from[128] + from[192];
}

#undef MIN_BLOCKS
