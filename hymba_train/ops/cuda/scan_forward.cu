// Selective scan, forward: scan_forward, and scan_chunk_states for chunks that run at the same time.

struct ForwardInput {
  Element u[GROUP], dt[GROUP], z[GROUP];
};
struct ForwardStreams {
  LaneStream u, dt, z;

  DEVICE void set(const Params& p, const LanePlace& at) {
    u.set(p.u, at.row * p.u_row + at.first * p.u_token + at.channel, p.u_token);
    dt.set(p.dt, at.row * p.dt_row + at.first * p.dt_token + at.channel, p.dt_token);
    z.set(p.z, at.row * p.z_row + at.first * p.z_token + at.channel, p.z_token);
  }
  template <bool OUTPUT, bool FULL>
  DEVICE void load_group(const LanePlace& at, int count, ForwardInput& input) {
    u.load<FULL>(at, count, input.u);
    dt.load<FULL>(at, count, input.dt);
    if (OUTPUT) z.load<FULL>(at, count, input.z);
  }
  // The group that starts at token `first`; moves on to the next.
  template <bool OUTPUT>
  DEVICE void load(const LanePlace& at, int first, ForwardInput& input) {
    int count = at.last - first;
    if (EXACT && count >= GROUP) {
      load_group<OUTPUT, true>(at, count, input);
    } else {
      load_group<OUTPUT, false>(at, count, input);
    }
    u.place += GROUP * u.step, dt.place += GROUP * dt.step, z.place += GROUP * z.step;
  }
};

struct ForwardGroup {
  float delta[GROUP], delta_u[GROUP], skip[GROUP], gate[GROUP];  // skip: D u; gate: silu(z)

  template <bool OUTPUT>
  DEVICE void set(const ForwardInput& input, int count, float bias, float D) {
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
      float q, u = element_float(input.u[t]);
      delta[t] = softplus(element_float(input.dt[t]) + bias, q);
      if (t >= count) delta[t] = 0.f;
      delta_u[t] = delta[t] * u;
      if (!OUTPUT) continue;
      float z = element_float(input.z[t]);
      skip[t] = D * u, gate[t] = z * sigmoid(z);
    }
  }
};

// GROUP steps. PLAIN: no document starts among them (a set bit of `starts`), and with EXACT all of them are there.
template <bool PLAIN, bool OUTPUT>
DEVICE void forward_steps(const Params& p, const LanePlace& at, const float* bc, unsigned starts, int count,
                          const float* initial, const float (&a2)[STATES], const ForwardGroup& group,
                          float (&h)[STATES], float& total, Element* out, Element* before) {
#pragma unroll
  for (int t = 0; t < GROUP; t++) {
    if (!PLAIN && (starts >> t & 1)) load_lane_state(p, at, initial, h);
    float B[STATES], C[STATES], y[2] = {group.skip[t], 0.f};
    load_row(bc + t * 32, B);
    if (OUTPUT) load_row(bc + t * 32 + STATES, C);
#pragma unroll
    for (int n = 0; n < STATES; n++) {
      h[n] = fmaf(ex2(group.delta[t] * a2[n]), h[n], B[n] * group.delta_u[t]);
      if (OUTPUT) y[n % 2] = fmaf(C[n], h[n], y[n % 2]);
    }
    if (!OUTPUT) total += group.delta[t];
    if (OUTPUT && ((EXACT && PLAIN) || (at.inside && t < count))) {
      before[(long long)t * p.channels] = to_element(y[0] + y[1]);
      out[(long long)t * p.channels] = to_element((y[0] + y[1]) * group.gate[t]);
    }
  }
}

template <bool OUTPUT>
DEVICE void run_forward(const Params& p, float* memory) {
  LanePlace at;
  at.set(p, next_unit(p, memory), false);
  float* bc = memory + at.warp * TILE * 32;
  float a2[STATES], h[STATES], total = 0.f;
  load_lane_A(p, at, a2);
  float bias = at.inside ? p.bias[at.channel] : 0.f, D = OUTPUT && at.inside ? p.D[at.channel] : 0.f;
  const float* initial = p.initial ? p.initial + at.row * p.initial_row : nullptr;
  ForwardInput input;
  ForwardStreams streams;
  LaneRows rows;
  streams.set(p, at);
  streams.load<OUTPUT>(at, at.first, input);
  rows.load(p, at, at.first);
  bool any_start = false;
  if (OUTPUT) {
    await_neighbour(p, at);
    if (at.order) {
      load_lane_private(p.carry + at.carry(p, p.chained ? 0 : at.chunk), h);
    } else {
      load_lane_state(p, at, initial, h);
    }
  } else {
#pragma unroll
    for (int n = 0; n < STATES; n++) h[n] = 0.f;
  }
  long long place = ((long long)at.row * p.tokens + at.first) * p.channels + at.channel;
  // Not wanted: written where y itself overwrites it, which costs less than a branch a token.
  Element *out = (Element*)p.y + place, *before = p.before ? (Element*)p.before + place : out;
  unsigned starts = 0;
#pragma unroll 1
  for (int first = at.first; first < at.last; first += GROUP) {
    int odd = (first - at.first) & GROUP;  // second group of a tile
    if (!odd) {
      sync_warp();
      rows.store(at.lane, bc);
      starts = vote(rows.start);
      sync_warp();
      if (OUTPUT && p.checkpoints) store_lane_private(p.checkpoints + at.carry(p, first / TILE), h);
      if (first + TILE < at.last) rows.load(p, at, first + TILE);
    }
    ForwardGroup group;
    group.set<OUTPUT>(input, at.last - first, bias, D);
    if (first + GROUP < at.last) streams.load<OUTPUT>(at, first + GROUP, input);
    unsigned mine = starts >> odd & ((1u << GROUP) - 1);
    any_start |= mine != 0;
    int count = at.last - first;
    if (mine || (EXACT && count < GROUP)) {
      forward_steps<false, OUTPUT>(p, at, bc + odd * 32, mine, count, initial, a2, group, h, total, out, before);
    } else {
      forward_steps<true, OUTPUT>(p, at, bc + odd * 32, mine, count, initial, a2, group, h, total, out, before);
    }
    out += (long long)GROUP * p.channels;
    before += (long long)GROUP * p.channels;
  }
  if (!OUTPUT) {
    store_chunk(p, at, h, total, any_start);
    return;
  }
  if (p.chained && !at.is_last(p)) {
    store_lane_private(p.carry + at.carry(p, 0), h);
    tell_neighbour(p, at);
  }
  if (at.chunk < p.chunks - 1 || !at.inside) return;
  float* final_state = p.final_state + ((long long)at.row * p.channels + at.channel) * p.states;
#pragma unroll
  for (int n = 0; n < STATES; n++)
    if (EXACT || n < p.states) final_state[n] = h[n];
}

// y, the final state and, if wanted (both or neither), the states before each tile and y before the gate.
#undef THREADS
#define THREADS LANE_THREADS
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
