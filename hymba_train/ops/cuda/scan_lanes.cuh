// Layout of the passes over time that need no sum over channels: a lane has one channel and its 16 states.
//
// A block is 2 warps of 32 channels. Nothing passes between lanes but B and C, which each warp keeps for itself in shared
// memory, so the only barriers are a warp's own. A step of 32 channels takes 16 exp2 of the state, which bind (8 clocks
// each), and some 110 other instructions. Input comes in groups of 8 tokens, loaded a group ahead.

constexpr int LANE_WARPS = 2, GROUP = 8;
static_assert(LANE_WARPS * 32 == BLOCK_CHANNELS && LANE_WARPS * 32 == LANE_THREADS, "a lane a channel");
static_assert(LANE_WARPS * TILE * 32 * 4 == LANES_SHARED, "shared memory of a block");
static_assert(TILE == 2 * GROUP, "a tile is two groups");

struct LanePlace : Unit {
  int lane, warp, channel;
  bool inside;

  DEVICE void set(const Params& p, int unit, bool reverse) {
    set_unit(p, unit, reverse);
    lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    channel = block * BLOCK_CHANNELS + threadIdx.x;
    inside = EXACT || channel < p.channels;
  }
  DEVICE long long carry(const Params& p, int slot) const {  // of this lane's first 4 states: as scan_backward has them
    return private_state(p, slot) + threadIdx.x / 16 * 256 + lane % 2 * 128 + lane % 16 / 2 * 4;
  }
};

DEVICE void load_lane_private(const float* base, float (&h)[STATES]) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    float4 x = load_shared_state((const float4*)(base + k * 32));
    h[4 * k] = x.x, h[4 * k + 1] = x.y, h[4 * k + 2] = x.z, h[4 * k + 3] = x.w;
  }
}

DEVICE void store_lane_private(float* base, const float (&h)[STATES]) {
#pragma unroll
  for (int k = 0; k < 4; k++)
    *(float4*)(base + k * 32) = make_float4(h[4 * k], h[4 * k + 1], h[4 * k + 2], h[4 * k + 3]);
}

// [channel][state] float32 in the caller's layout; null: zeros.
DEVICE void load_lane_state(const Params& p, const LanePlace& at, const float* base, float (&h)[STATES]) {
#pragma unroll
  for (int n = 0; n < STATES; n++)
    h[n] = base && at.inside && (EXACT || n < p.states) ? base[(long long)at.channel * p.states + n] : 0.f;
}

DEVICE void load_lane_A(const Params& p, const LanePlace& at, float (&a2)[STATES]) {  // exp(delta A) = exp2(delta a2)
  load_lane_state(p, at, p.A_log, a2);
#pragma unroll
  for (int n = 0; n < STATES; n++) a2[n] = -ex2(a2[n] * LOG2E) * LOG2E;
}

// One number of a token of one tensor, token after token.
struct LaneStream {
  const Element* place;
  long long step;

  DEVICE void set(const void* base, long long offset, long long token_stride) {
    place = (const Element*)base + offset, step = token_stride;
  }
  // GROUP tokens, of which `count` are there; FULL: surely all of them, and the lane's channel too.
  template <bool FULL>
  DEVICE void load(const LanePlace& at, int count, Element (&x)[GROUP]) const {
#pragma unroll
    for (int t = 0; t < GROUP; t++) x[t] = FULL || (at.inside && t < count) ? place[t * step] : Element{};
  }
};

// B, C and the starts of documents of a tile, for one warp.
struct LaneRows {
  Quarter bc[4];
  bool start;

  DEVICE void load(const Params& p, const LanePlace& at, int first) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int token = first + j * 4 + at.lane / 8;
      bc[j].load(p, at.row, token, at.lane % 8, token < at.last);
    }
    start = document_starts(p, at, first, at.lane);
  }
  DEVICE void store(int lane, float* bc_shared) const {  // [token][B 16 | C 16]
#pragma unroll
    for (int j = 0; j < 4; j++) bc[j].store(bc_shared + j * 128 + lane * 4);
  }
};

DEVICE void load_row(const float* from, float (&x)[STATES]) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    float4 y = *(const float4*)(from + 4 * k);
    x[4 * k] = y.x, x[4 * k + 1] = y.y, x[4 * k + 2] = y.z, x[4 * k + 3] = y.w;
  }
}

// What a chunk that was run on its own adds, the sum of its delta, and whether a state passes through it.
DEVICE void store_chunk(const Params& p, const LanePlace& at, const float (&h)[STATES], float total, bool any_start) {
  store_lane_private(p.carry + at.carry(p, at.chunk), h);
  long long unit = (long long)(at.chunk * p.batch + at.row) * p.blocks + at.block;
  p.sum_delta[unit * BLOCK_CHANNELS + threadIdx.x] = total;
  if (at.block == 0 && threadIdx.x == 0) p.keep[at.chunk * p.batch + at.row] = !any_start;
}
