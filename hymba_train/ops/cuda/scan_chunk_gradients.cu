// Selective scan: the gradient that each chunk's outputs send to the state before the chunk (carry), for chunks that run
// at the same time. Compiled after scan_forward.cu, whose THREADS and MIN_BLOCKS it shares.

struct GradientInput {
  Element dt[GROUP], z[GROUP], dy[GROUP];
};
struct GradientStreams {
  LaneStream dt, z, dy;

  DEVICE void set(const Params& p, const LanePlace& at, int first) {
    dt.set(p.dt, at.row * p.dt_row + first * p.dt_token + at.channel, p.dt_token);
    z.set(p.z, at.row * p.z_row + first * p.z_token + at.channel, p.z_token);
    dy.set(p.dy, at.row * p.dy_row + first * p.dy_token + at.channel, p.dy_token);
  }
  template <bool FULL>
  DEVICE void load_group(const LanePlace& at, int count, GradientInput& input) {
    dt.load<FULL>(at, count, input.dt);
    z.load<FULL>(at, count, input.z);
    dy.load<FULL>(at, count, input.dy);
  }
  // The group that starts at token `first`; moves on to the one before.
  DEVICE void load(const LanePlace& at, int first, GradientInput& input) {
    int count = at.last - first;
    if (EXACT && count >= GROUP) {
      load_group<true>(at, count, input);
    } else {
      load_group<false>(at, count, input);
    }
    dt.place -= GROUP * dt.step, z.place -= GROUP * z.step, dy.place -= GROUP * dy.step;
  }
};

template <bool RESET>
DEVICE void gradient_steps(const float* bc, unsigned starts, const float (&a2)[STATES], const float (&delta)[GROUP],
                           const float (&through)[GROUP], float (&g)[STATES]) {
#pragma unroll
  for (int t = GROUP - 1; t >= 0; t--) {
    float C[STATES];
    load_row(bc + t * 32 + STATES, C);
#pragma unroll
    for (int n = 0; n < STATES; n++) g[n] = ex2(delta[t] * a2[n]) * fmaf(C[n], through[t], g[n]);
    if (RESET && (starts >> t & 1)) {
#pragma unroll
      for (int n = 0; n < STATES; n++) g[n] = 0.f;
    }
  }
}

KERNEL(scan_chunk_gradients) {
  SHARED(memory);
  LanePlace at;
  at.set(p, blockIdx.x, true);
  float* bc = memory + at.warp * TILE * 32;
  float a2[STATES], g[STATES], total = 0.f, bias = at.inside ? p.bias[at.channel] : 0.f;
  load_lane_A(p, at, a2);
#pragma unroll
  for (int n = 0; n < STATES; n++) g[n] = 0.f;
  int first = at.first + (at.last - at.first - 1) / GROUP * GROUP;
  GradientInput input;
  GradientStreams streams;
  LaneRows rows;
  streams.set(p, at, first);
  streams.load(at, first, input);
  rows.load(p, at, at.first + (first - at.first) / TILE * TILE);
  bool any_start = false, fresh = true;
  unsigned starts = 0;
#pragma unroll 1
  for (; first >= at.first; first -= GROUP) {
    int odd = (first - at.first) & GROUP;  // second group of a tile
    if (odd || fresh) {
      sync_warp();
      rows.store(at.lane, bc);
      starts = vote(rows.start);
      sync_warp();
      if (first - odd > at.first) rows.load(p, at, first - odd - TILE);
    }
    fresh = false;
    float delta[GROUP], through[GROUP];
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
      float q, z = element_float(input.z[t]);
      delta[t] = softplus(element_float(input.dt[t]) + bias, q);
      if (first + t >= at.last) delta[t] = 0.f;
      through[t] = element_float(input.dy[t]) * sigmoid(z) * z;
      total += delta[t];
    }
    if (first > at.first) streams.load(at, first - GROUP, input);
    unsigned mine = starts >> odd & ((1u << GROUP) - 1);
    if (mine) {
      any_start = true;
      gradient_steps<true>(bc + odd * 32, mine, a2, delta, through, g);
    } else {
      gradient_steps<false>(bc + odd * 32, mine, a2, delta, through, g);
    }
  }
  store_chunk(p, at, g, total, any_start);
}
#undef MIN_BLOCKS
#undef THREADS
#define THREADS 128
