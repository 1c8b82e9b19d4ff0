// Selective scan: the gradient that each chunk's outputs send to the state before the chunk (carry), for chunks that
// run at the same time. Compiled after scan_forward.cu, whose MIN_BLOCKS it shares.

struct GradientItems {
  Pair dt[QUADS], z[QUADS], dy[QUADS];

  DEVICE void load(const Params& p, const Place& at, int first) {
    load_items_at(p, at, first, p.dt, p.dt_row, p.dt_token, NO_TIME, dt);
    load_items_at(p, at, first, p.z, p.z_row, p.z_token, ZERO, z);
    load_items_at(p, at, first, p.dy, p.dy_row, p.dy_token, ZERO, dy);
  }
};

template <bool RESET>
DEVICE void gradient_steps(const Place& at, const float* records, const float* bc, unsigned starts,
                           const float (&a2)[8], float (&g)[8]) {
#pragma unroll FORWARD_UNROLL
  for (int t = TILE - 1; t >= 0; t--) {
    float delta[4], C[4];  // delta 0, delta 1, gradients to the sums before the gate
    unpack4(records + (t * PAIRS + at.pair) * 4, delta);
    unpack4(bc + t * 32 + 16 + at.sg * 4, C);
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] = ex2(delta[i / 4] * a2[i]) * fmaf(C[i % 4], delta[2 + i / 4], g[i]);
    if (RESET && (starts >> t & 1)) {
#pragma unroll
      for (int i = 0; i < 8; i++) g[i] = 0.f;
    }
  }
}

KERNEL(scan_chunk_gradients) {
  SHARED(memory);
  ForwardShared shared(memory);
  Place at;
  at.set(p, blockIdx.x, true);
  float a2[8], g[8] = {}, total[2] = {0.f, 0.f}, bias[2];
  load_A(p, at, a2);
  load_channels(p, at, p.bias, bias);
  int first = at.first + (at.last - at.first - 1) / TILE * TILE;
  GradientItems next;
  TileRows rows;
  next.load(p, at, first);
  rows.load(p, at, first);
  bool any_start = false;
#pragma unroll 1
  for (; first >= at.first; first -= TILE) {
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      float2 dt = unpack(next.dt[i]), z = unpack(next.z[i]), dy = unpack(next.dy[i]);
      float q, d0 = softplus(dt.x + bias[0], q), d1 = softplus(dt.y + bias[1], q);
      *(float4*)(shared.records + ((i * QUAD + at.sg) * PAIRS + at.pair) * 4) =
          make_float4(d0, d1, dy.x * sigmoid(z.x) * z.x, dy.y * sigmoid(z.y) * z.y);
      total[0] += d0, total[1] += d1;
    }
    float* bc = shared.bc + (first & TILE) * 32;
    rows.store(bc);
    unsigned starts = vote(rows.start);
    sync_block();
    if (first > at.first) {
      next.load(p, at, first - TILE);
      rows.load(p, at, first - TILE);
    }
    if (starts) {
      any_start = true;
      gradient_steps<true>(at, shared.records, bc, starts, a2, g);
    } else {
      gradient_steps<false>(at, shared.records, bc, starts, a2, g);
    }
    sync_warp();
  }
  store_chunk(p, at, g, total, any_start);
}
#undef MIN_BLOCKS
