// Selective scan, forward: scan_forward, and scan_chunk_states for chunks that run at the same time.

struct ForwardShared {
  float* records;  // [token][pair] {delta 0, delta 1, delta u 0, delta u 1}
  float* bc;       // [token][32]
  float* y;        // [token][Y_STRIDE]
  DEVICE explicit ForwardShared(float* base)
      : records(base), bc(base + TILE * PAIRS * 4), y(base + TILE * PAIRS * 4 + TILE * 32) {}
  static constexpr int FLOATS = TILE * (PAIRS * 4 + 32 + Y_STRIDE);
};
static_assert(ForwardShared::FLOATS * 4 == SCAN_FORWARD_SHARED, "shared memory of scan_forward");
static_assert(ForwardShared::FLOATS * 4 == SCAN_CHUNK_STATES_SHARED, "shared memory of scan_chunk_states");

DEVICE void unpack4(const float* from, float (&to)[4]) {
  float4 x = *(const float4*)from;
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// TILE steps; RESET: there are document starts among them, the set bits of `starts`.
template <bool RESET, bool OUTPUT>
DEVICE void forward_steps(const Params& p, const Place& at, const ForwardShared& shared, unsigned starts,
                          const float* initial, const float (&a2)[8], float (&h)[8], float (&total)[2]) {
#pragma unroll 2
  for (int t = 0; t < TILE; t += 2) {
    float sums[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (RESET && (starts >> (t + j) & 1)) load_state(p, at, initial, h);
      float delta[4], B[4], C[4], y[2] = {0.f, 0.f};
      unpack4(shared.records + ((t + j) * PAIRS + at.warp * 8 + at.cg) * 4, delta);
      unpack4(shared.bc + (t + j) * 32 + at.sg * 4, B);
      if (OUTPUT) unpack4(shared.bc + (t + j) * 32 + 16 + at.sg * 4, C);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float a = ex2(delta[i / 4] * a2[i]);
        h[i] = fmaf(B[i % 4], delta[2 + i / 4], a * h[i]);
        if (OUTPUT) y[i / 4] = fmaf(C[i % 4], h[i], y[i / 4]);
      }
      if (OUTPUT) {
        sums[j] = halve(y[0], y[1], at.lane, 8);
      } else {
        total[0] += delta[0], total[1] += delta[1];
      }
    }
    if (OUTPUT) {
      float y = halve(sums[0], sums[1], at.lane, 16);
      shared.y[(t + at.sg / 2) * Y_STRIDE + at.warp * 16 + at.cg * 2 + at.sg % 2] = y;
    }
  }
}

// Raw input of one tile, a thread's items: 4 tokens x 2 channels. `load` moves on to the next tile.
struct ForwardItems {
  Pair u[ITEMS], dt[ITEMS], z[ITEMS];
};
struct ForwardStreams {
  Stream u, dt, z;

  DEVICE void set(const Params& p, const Place& at) {
    int token = at.first + at.warp;
    u.set(p.u, at.row * p.u_row, p.u_token, token, at.item);
    dt.set(p.dt, at.row * p.dt_row, p.dt_token, token, at.item);
    z.set(p.z, at.row * p.z_row, p.z_token, token, at.item);
  }
  template <bool OUTPUT>
  DEVICE void load(const Params& p, const Place& at, int first, ForwardItems& items) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      bool valid = first + i * WARPS + at.warp < at.last;
      items.u[i] = u.load(i, at.item, p.channels, valid);
      items.dt[i] = dt.load(i, at.item, p.channels, valid);
      if (OUTPUT) items.z[i] = z.load(i, at.item, p.channels, valid);
    }
    u.move(1), dt.move(1), z.move(1);
  }
};

template <bool OUTPUT>
DEVICE void run_forward(const Params& p, float* memory) {
  ForwardShared shared(memory);
  Place at;
  at.set(p, next_unit(p, memory), false);
  float a2[8], h[8], total[2] = {0.f, 0.f};
  load_A(p, at, a2);
  float bias[2], skip[2];
#pragma unroll
  for (int c = 0; c < 2; c++) {
    bias[c] = at.item + c < p.channels ? p.bias[at.item + c] : 0.f;
    skip[c] = OUTPUT && at.item + c < p.channels ? p.D[at.item + c] : 0.f;
  }
  const float* initial = p.initial ? p.initial + at.row * p.initial_row : nullptr;
  ForwardItems next;
  ForwardStreams streams;
  TileRows rows;
  streams.set(p, at);
  streams.load<OUTPUT>(p, at, at.first, next);
  rows.load(p, at, at.first);
  bool any_start = false;
  if (OUTPUT) {
    receive(p, at, initial, h);
  } else {
    for (int i = 0; i < 8; i++) h[i] = 0.f;
  }
  for (int first = at.first; first < at.last; first += TILE) {
    ForwardItems items = next;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      int token = i * WARPS + at.warp;
      bool valid = first + token < at.last;
      float2 u = unpack(items.u[i]), dt = unpack(items.dt[i]);
      float q, delta0 = softplus(dt.x + bias[0], q), delta1 = softplus(dt.y + bias[1], q);
      delta0 = valid ? delta0 : 0.f, delta1 = valid ? delta1 : 0.f;
      *(float4*)(shared.records + (token * PAIRS + at.lane) * 4) = make_float4(delta0, delta1, delta0 * u.x, delta1 * u.y);
    }
    rows.store(shared.bc);
    unsigned starts = vote(rows.start);
    sync_block();
    if (first + TILE < at.last) {
      streams.load<OUTPUT>(p, at, first + TILE, next);
      rows.load(p, at, first + TILE);
    }
    if (OUTPUT && p.checkpoints) store_private(p.checkpoints + at.carry(p, first / TILE), h);
    if (starts) {
      any_start = true;
      forward_steps<true, OUTPUT>(p, at, shared, starts, initial, a2, h, total);
    } else {
      forward_steps<false, OUTPUT>(p, at, shared, starts, initial, a2, h, total);
    }
    sync_block();
    long long offset = ((long long)at.row * p.tokens + first + at.warp) * p.channels + at.item;
#pragma unroll
    for (int i = 0; i < (OUTPUT ? ITEMS : 0); i++) {
      int token = i * WARPS + at.warp;
      if (first + token >= at.last) continue;
      float2 u = unpack(items.u[i]), z = unpack(items.z[i]), y = *(const float2*)(shared.y + token * Y_STRIDE + at.lane * 2);
      float y0 = fmaf(skip[0], u.x, y.x) * z.x * sigmoid(z.x), y1 = fmaf(skip[1], u.y, y.y) * z.y * sigmoid(z.y);
      store_pair(p.y, offset + (long long)i * WARPS * p.channels, at.item, p.channels, pack(y0, y1));
    }
  }
  if (OUTPUT) {
    send(p, at, h);
    if (at.chunk == p.chunks - 1)
      store_state(p, at, p.final_state + (long long)at.row * p.channels * p.states, h, false);
  } else {
    store_chunk(p, at, h, total, any_start);
  }
}

// y, the final state and, if wanted, the states before each tile.
#define MIN_BLOCKS FORWARD_BLOCKS
KERNEL(scan_forward) {
  SHARED(memory);
  run_forward<true>(p, memory);
}

// Each chunk's end state from a zero start (carry), the sum of delta, and whether a state passes through (keep).
KERNEL(scan_chunk_states) {
  SHARED(memory);
  run_forward<false>(p, memory);
}
#undef MIN_BLOCKS
