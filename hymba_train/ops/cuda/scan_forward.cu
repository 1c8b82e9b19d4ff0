// Selective scan, forward: scan_forward, and scan_chunk_states for chunks that run at the same time.
//
// Tiles of 16 steps. Per tile each lane brings its items' delta and delta u to shared memory, the steps leave each
// lane's share of y there, and each lane finishes its items. Between warps go B and C only: one barrier a tile.

struct ForwardShared {
  float* records;  // [token][pair] {delta 0, delta 1, delta u 0, delta u 1}
  float* sums;     // [token][thread] float2: sums over a lane's states of C h
  float* bc;       // [tile % 2][token][32]
  DEVICE explicit ForwardShared(float* base) {
    records = base;
    bc = records + TILE * PAIRS * 4;
    sums = bc + 2 * TILE * 32;
  }
  static constexpr int SUM_TOKEN = 128 * 2 + 16;  // no bank conflict between tokens
  static constexpr int FLOATS = TILE * (PAIRS * 4 + 2 * 32 + SUM_TOKEN);
};
static_assert(ForwardShared::FLOATS * 4 == SCAN_FORWARD_SHARED, "shared memory of scan_forward");

struct ForwardItems {
  Pair u[QUADS], dt[QUADS], z[QUADS];
};
struct ForwardStreams {  // `load` moves on to the next tile
  const Element *u, *dt, *z;

  DEVICE void set(const Params& p, const Place& at) {
    u = item_place(at, at.first, p.u, p.u_row, p.u_token);
    dt = item_place(at, at.first, p.dt, p.dt_row, p.dt_token);
    z = item_place(at, at.first, p.z, p.z_row, p.z_token);
  }
  template <bool OUTPUT>
  DEVICE void load(const Params& p, const Place& at, int first, ForwardItems& items) {
    load_items(p, at, first, u, p.u_token, ZERO, items.u);
    load_items(p, at, first, dt, p.dt_token, NO_TIME, items.dt);
    if (OUTPUT) load_items(p, at, first, z, p.z_token, ZERO, items.z);
    u += TILE * p.u_token, dt += TILE * p.dt_token, z += TILE * p.z_token;
  }
};

DEVICE void open_forward(const Place& at, float* records, const ForwardItems& items, const float (&bias)[2],
                         float (&total)[2]) {
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    float2 u = unpack(items.u[i]), dt = unpack(items.dt[i]);
    float q, d0 = softplus(dt.x + bias[0], q), d1 = softplus(dt.y + bias[1], q);
    *(float4*)(records + ((i * QUAD + at.sg) * PAIRS + at.pair) * 4) = make_float4(d0, d1, d0 * u.x, d1 * u.y);
    total[0] += d0, total[1] += d1;
  }
}

template <bool RESET, bool OUTPUT>
DEVICE void forward_steps(const Params& p, const Place& at, const ForwardShared& shared, const float* bc,
                          unsigned starts, const float (&a2)[8], float (&h)[8]) {
#pragma unroll FORWARD_UNROLL
  for (int t = 0; t < TILE; t++) {
    if (RESET && (starts >> t & 1)) load_state(p, at, row_initial(p, at), h);
    float delta[4], B[4], C[4];
    unpack4(shared.records + (t * PAIRS + at.pair) * 4, delta);
    unpack4(bc + t * 32 + at.sg * 4, B);
    if (OUTPUT) unpack4(bc + t * 32 + 16 + at.sg * 4, C);
#pragma unroll
    for (int i = 0; i < 8; i++) h[i] = fmaf(ex2(delta[i / 4] * a2[i]), h[i], B[i % 4] * delta[2 + i / 4]);
    if (!OUTPUT) continue;
    float y[2] = {C[0] * h[0], C[0] * h[4]};
#pragma unroll
    for (int s = 1; s < 4; s++) y[0] = fmaf(C[s], h[s], y[0]), y[1] = fmaf(C[s], h[4 + s], y[1]);
    *(float2*)(shared.sums + t * ForwardShared::SUM_TOKEN + threadIdx.x * 2) = make_float2(y[0], y[1]);
  }
}

// y, and y before the gate if wanted, of the lane's items of a tile.
DEVICE void close_forward(const Params& p, const Place& at, const ForwardShared& shared, int first,
                          const Pair (&raw_u)[QUADS], const Pair (&raw_z)[QUADS], const float (&skip)[2]) {
  long long place = ((long long)at.row * p.tokens + first + at.sg) * p.channels + at.channel;
#pragma unroll
  for (int i = 0; i < QUADS; i++, place += QUAD * p.channels) {
    float2 u = unpack(raw_u[i]), z = unpack(raw_z[i]), y = make_float2(skip[0] * u.x, skip[1] * u.y);
    const float* from = shared.sums + (i * QUAD + at.sg) * ForwardShared::SUM_TOKEN + at.warp * 64 + at.cg * 2;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float2 x = *(const float2*)(from + k * 16);
      y.x += x.x, y.y += x.y;
    }
    if (first + i * QUAD + at.sg >= at.last) continue;
    if (p.before) store_pair(p.before, place, at.channel, p.channels, pack(y.x, y.y));
    store_pair(p.y, place, at.channel, p.channels, pack(y.x * (z.x * sigmoid(z.x)), y.y * (z.y * sigmoid(z.y))));
  }
}

template <bool OUTPUT>
DEVICE void run_forward(const Params& p, float* memory) {
  ForwardShared shared(memory);
  Place at;
  at.set(p, next_unit(p, memory), false);
  float a2[8], h[8], bias[2], skip[2], total[2] = {0.f, 0.f};
  load_A(p, at, a2);
  load_channels(p, at, p.bias, bias), load_channels(p, at, p.D, skip);
  ForwardItems next;
  ForwardStreams streams;
  TileRows rows;
  streams.set(p, at);
  streams.load<OUTPUT>(p, at, at.first, next);
  rows.load(p, at, at.first);
  if (OUTPUT) {
    await_neighbour(p, at);
    if (at.order) {
      load_private(p.carry + at.carry(p, p.chained ? 0 : at.chunk), h);
    } else {
      load_state(p, at, row_initial(p, at), h);
    }
  } else {
    for (int i = 0; i < 8; i++) h[i] = 0.f;
  }
  bool any_start = false;
#pragma unroll 1
  for (int first = at.first; first < at.last; first += TILE) {
    if (OUTPUT && p.checkpoints) store_private(p.checkpoints + at.carry(p, first / TILE), h);
    open_forward(at, shared.records, next, bias, total);
    Pair u[QUADS], z[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++) u[i] = next.u[i], z[i] = next.z[i];
    float* bc = shared.bc + (first & TILE) * 32;
    rows.store(bc);
    unsigned starts = vote(rows.start);
    sync_block();
    if (first + TILE < at.last) {
      streams.load<OUTPUT>(p, at, first + TILE, next);
      rows.load(p, at, first + TILE);
    }
    if (starts) {
      any_start = true;
      forward_steps<true, OUTPUT>(p, at, shared, bc, starts, a2, h);
    } else {
      forward_steps<false, OUTPUT>(p, at, shared, bc, starts, a2, h);
    }
    sync_warp();
    if (OUTPUT) close_forward(p, at, shared, first, u, z, skip);
  }
  if (!OUTPUT) {
    store_chunk(p, at, h, total, any_start);
    return;
  }
  if (at.is_last(p)) {
    store_state(p, at, p.final_state + (long long)at.row * p.channels * p.states, h, false);
  } else if (p.chained) {
    store_private(p.carry + at.carry(p, 0), h);
    tell_neighbour(p, at);
  }
}

// y, the final state and, if wanted (both or neither), the states before each tile and y before the gate.
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
