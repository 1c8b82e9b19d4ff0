// Selective scan: parameters, layout and small functions that all its kernels share.
//
// Compiled at run time (selective_scan_cuda.py), with -D X_BF16=0|1 (type of u, dt, z, y and their gradients) and
// -D BC_BF16=0|1 (type of B and C); otherwise float32. -D EXACT=1 leaves out the guards: 16 states, blocks of channels
// without a rest, every pair of channels and every 4 states aligned. With -D SCAN_HOST the very same source becomes C++
// for a warp emulator on a CPU (tests/ops/emulator), which supplies the primitives of the first section.
//
// Layout of the passes over time. A block is 4 warps; a warp has 16 channels x 16 states, a lane 2 channels x 4 states,
// register [c][s]:
//     sg = lane / 8: states 4 sg + s;    cg = lane % 8: channels 2 cg + c of the warp's 16.
// What needs no state is done once for two channels of a token ("item"), by the lane that has those channels and
// sg = token % 4. It goes to the warp's other lanes, and their sums over states come back, through shared memory. Sums
// over channels go to the tensor cores, because (lane / 4, lane % 4) is (row, k) of an A fragment of mma.m16n8k8.

#ifndef SCAN_HOST
#define KERNEL(name) \
  extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) name(const __grid_constant__ Params p)
#define DEVICE __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(16) float name[]
DEVICE float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float shuffle_xor(float x, int bit) { return __shfl_xor_sync(0xffffffffu, x, bit); }
DEVICE unsigned vote(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float from_bits(unsigned x) { return __uint_as_float(x); }
DEVICE unsigned to_bits(float x) { return __float_as_uint(x); }
DEVICE unsigned pack_bf16(float low, float high) {
  unsigned r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
DEVICE void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(to_bits(a0)), "r"(to_bits(a1)), "r"(to_bits(a2)), "r"(to_bits(a3)), "r"(to_bits(b0)), "r"(to_bits(b1)));
}
DEVICE int take_ticket(int* counter) { return atomicAdd(counter, 1); }
DEVICE void wait_at_least(const int* flag, int value) {
  int seen;
  while (true) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    if (seen >= value) return;
    __nanosleep(100);
  }
}
DEVICE void publish(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(flag), "r"(value) : "memory");
}
DEVICE void prefetch(const float* x) { asm volatile("prefetch.global.L2 [%0];" :: "l"(x)); }
DEVICE float4 load_shared_state(const float4* x) { return __ldcg(x); }  // written by another block of this launch
#endif

constexpr int WARPS = 4, PAIRS = 32, BLOCK_CHANNELS = 64, TILE = 16, QUAD = 4, QUADS = TILE / QUAD, STATES = 16;
constexpr int PRIVATE_STATE = BLOCK_CHANNELS * STATES;  // floats of a block's states, in the order of its lanes
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct Params {
  const void *u, *dt, *z, *dy, *B, *C;
  void* before;  // y before the gate [row][token][channel]; null: not wanted
  const float *A_log, *D, *bias, *initial, *d_final;  // initial, d_final may be null: zeros
  const long long* segments;                          // null: one document a row
  void *y, *du, *ddt, *dz, *dB, *dC;
  float *final_state, *checkpoints;  // checkpoints: states before each tile, null: not wanted
  float *carry, *sum_delta;          // state (or its gradient) that enters a chunk; sum of delta over a chunk
  float *part_bc, *part_A, *part_D, *part_bias, *d_initial, *d_reset;
  float *dA_log, *dD, *dbias, *d_initial_out;
  int *sync, *keep;
  long long u_row, u_token, dt_row, dt_token, z_row, z_token, dy_row, dy_token, B_row, B_token, C_row, C_token;
  long long segment_row, initial_row, dz_token;  // dz may lie in wider rows, one after the other
  int batch, tokens, channels, states, blocks, chunk_tokens, chunks, chained;
};

#define THREADS 128
#if X_BF16
// NO_TIME: a raw time step whose softplus is 0, for tokens and channels that are not there.
typedef unsigned Pair;  // two channels as they lie in memory
typedef unsigned short Element;
DEVICE float2 unpack(Pair x) { return make_float2(from_bits(x << 16), from_bits(x & 0xffff0000u)); }
DEVICE Pair pack(float a, float b) { return pack_bf16(a, b); }
DEVICE float element_float(Element x) { return from_bits((unsigned)x << 16); }
DEVICE Element to_element(float x) { return (Element)pack_bf16(x, 0.f); }
DEVICE Pair pack_elements(Element a, Element b) { return a | (unsigned)b << 16; }
DEVICE Element low(Pair x) { return (Element)x; }
DEVICE Element high(Pair x) { return (Element)(x >> 16); }
constexpr Element ZERO = 0, NO_TIME = 0xf149;
#else
typedef float2 Pair;
typedef float Element;
DEVICE float2 unpack(Pair x) { return x; }
DEVICE Pair pack(float a, float b) { return make_float2(a, b); }
DEVICE float element_float(Element x) { return x; }
DEVICE Element to_element(float x) { return x; }
DEVICE Pair pack_elements(Element a, Element b) { return make_float2(a, b); }
DEVICE Element low(Pair x) { return x.x; }
DEVICE Element high(Pair x) { return x.y; }
constexpr Element ZERO = 0.f, NO_TIME = -1e30f;
#endif
#if BC_BF16
typedef unsigned short BCElement;
DEVICE float bc_float(BCElement x) { return from_bits((unsigned)x << 16); }
DEVICE BCElement bc_element(float x) { return (BCElement)pack_bf16(x, 0.f); }
#else
typedef float BCElement;
DEVICE float bc_float(BCElement x) { return x; }
DEVICE BCElement bc_element(float x) { return x; }
#endif

DEVICE void store_pair(void* base, long long offset, int channel, int channels, Pair x) {
  Element* at = (Element*)base + offset;
#if EXACT
  *(Pair*)at = x;
#else
  if (channel < channels) at[0] = low(x);
  if (channel + 1 < channels) at[1] = high(x);
#endif
}

// log(1 + q) / q on [0, 1]: no logarithm of a number near 1, where small time steps would lose their digits. Relative
// error 2e-7; with bf16 time steps, which are rounded to 2e-3, 9e-6.
DEVICE float log1p_over(float q) {
#if X_BF16
  float r = -2.386915170e-02f;
  r = fmaf(r, q, 1.012222848e-01f);
  r = fmaf(r, q, -2.100486899e-01f);
  r = fmaf(r, q, 3.252066802e-01f);
  r = fmaf(r, q, -4.993613647e-01f);
  return fmaf(r, q, 9.999915982e-01f);
#else
  float r = 5.232705735e-03f;
  r = fmaf(r, q, -2.950528450e-02f);
  r = fmaf(r, q, 7.822602987e-02f);
  r = fmaf(r, q, -1.366325170e-01f);
  r = fmaf(r, q, 1.910600960e-01f);
  r = fmaf(r, q, -2.484298348e-01f);
  r = fmaf(r, q, 3.331909776e-01f);
  r = fmaf(r, q, -4.999949336e-01f);
  return fmaf(r, q, 9.999999404e-01f);
#endif
}

DEVICE float softplus(float x, float& q) {  // q = exp(-|x|)
  q = ex2(-fabsf(x) * LOG2E);
  return fmaf(q, log1p_over(q), fmaxf(x, 0.f));
}

DEVICE float sigmoid(float x) { return reciprocal(1.f + ex2(-x * LOG2E)); }

// What a block works on: 64 channels of a row, over a chunk of its tokens.
struct Unit {
  int row, block, chunk, first, last, order;

  DEVICE void set_unit(const Params& p, int unit, bool reverse) {
    int wide = p.batch * p.blocks, chain = unit % wide;
    order = unit / wide;  // 0 for the chunk that comes first in the direction of the scan
    chunk = reverse ? p.chunks - 1 - order : order;
    row = chain / p.blocks, block = chain % p.blocks;
    first = chunk * p.chunk_tokens;
    last = min(first + p.chunk_tokens, p.tokens);
  }
  DEVICE long long private_state(const Params& p, int slot) const {  // of the block, in Params::carry and checkpoints
    return ((long long)(slot * p.batch + row) * p.blocks + block) * PRIVATE_STATE;
  }
  DEVICE bool is_last(const Params& p) const { return order == p.chunks - 1; }
};

struct Place : Unit {
  int lane, warp, sg, cg;
  int channel;  // first of the lane's two
  int pair;     // number of the lane's two channels in the block

  DEVICE void set(const Params& p, int unit, bool reverse) {
    set_unit(p, unit, reverse);
    lane = threadIdx.x & 31, warp = threadIdx.x >> 5, sg = lane >> 3, cg = lane & 7;
    pair = warp * 8 + cg, channel = block * BLOCK_CHANNELS + pair * 2;
  }
  DEVICE long long carry(const Params& p, int slot) const {  // of this lane's first 4 states
    return private_state(p, slot) + warp * 256 + lane * 4;
  }
};

// Blocks take their work in order of dispatch, so that what a block waits for is always at work or done.
DEVICE int next_unit(const Params& p, float* shared) {
  if (!p.chained) return blockIdx.x;
  if (threadIdx.x == 0) *(int*)shared = take_ticket(p.sync);
  sync_block();
  int unit = *(int*)shared;
  sync_block();
  return unit;
}

// Place in [channel][state] of element i of a lane; false: there is none.
DEVICE bool in_state(const Params& p, const Place& at, int i, long long& place) {
  int c = at.channel + i / 4, n = at.sg * 4 + i % 4;
  place = (long long)c * p.states + n;
  return EXACT || (c < p.channels && n < p.states);
}

// [channel][state] float32 in the caller's layout; null: zeros.
DEVICE void load_state(const Params& p, const Place& at, const float* base, float (&h)[8]) {
#if EXACT
  const float4* from = (const float4*)(base + at.channel * STATES + at.sg * 4);
  float4 zero = make_float4(0.f, 0.f, 0.f, 0.f), x = base ? from[0] : zero, y = base ? from[STATES / 4] : zero;
  h[0] = x.x, h[1] = x.y, h[2] = x.z, h[3] = x.w, h[4] = y.x, h[5] = y.y, h[6] = y.z, h[7] = y.w;
#else
  for (int i = 0; i < 8; i++) {
    long long place;
    bool inside = in_state(p, at, i, place);
    h[i] = base && inside ? base[place] : 0.f;
  }
#endif
}

DEVICE void store_state(const Params& p, const Place& at, float* base, const float (&h)[8], bool add) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    long long place;
    if (in_state(p, at, i, place)) base[place] = add ? base[place] + h[i] : h[i];
  }
}

DEVICE void load_A(const Params& p, const Place& at, float (&a2)[8]) {  // exp(delta A) = exp2(delta a2)
#pragma unroll
  for (int i = 0; i < 8; i++) {
    long long place;
    a2[i] = in_state(p, at, i, place) ? -ex2(p.A_log[place] * LOG2E) * LOG2E : 0.f;
  }
}

DEVICE void load_private(const float* base, float (&h)[8]) {
  float4 x = load_shared_state((const float4*)base), y = load_shared_state((const float4*)(base + 128));
  h[0] = x.x, h[1] = x.y, h[2] = x.z, h[3] = x.w, h[4] = y.x, h[5] = y.y, h[6] = y.z, h[7] = y.w;
}

DEVICE void store_private(float* base, const float (&h)[8]) {
  *(float4*)base = make_float4(h[0], h[1], h[2], h[3]);
  *(float4*)(base + 128) = make_float4(h[4], h[5], h[6], h[7]);
}

// Chained chunks: each waits until its neighbour has left its state in `carry`.
DEVICE void await_neighbour(const Params& p, const Unit& at) {
  if (!p.chained || at.order == 0) return;
  if (threadIdx.x == 0) wait_at_least(p.sync + 1 + at.row * p.blocks + at.block, at.order);
  sync_block();
}

DEVICE void tell_neighbour(const Params& p, const Unit& at) {
  sync_block();
  if (threadIdx.x == 0) publish(p.sync + 1 + at.row * p.blocks + at.block, at.order + 1);
}

// 4 numbers of B or C of a token: a quarter of 8.
struct Quarter {
  BCElement x[4];

  DEVICE void load(const Params& p, int row, int token, int quarter, bool valid) {
    int n = quarter % 4 * 4;
    const BCElement* from = quarter < 4 ? (const BCElement*)p.B + row * p.B_row + token * p.B_token
                                        : (const BCElement*)p.C + row * p.C_row + token * p.C_token;
#if EXACT
    struct alignas(4 * sizeof(BCElement)) Four { BCElement x[4]; } four = {};
    if (valid) four = *(const Four*)(from + n);
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = four.x[j];
#else
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = valid && n + j < p.states ? from[n + j] : bc_element(0.f);
#endif
  }
  DEVICE void store(float* to) const {
    *(float4*)to = make_float4(bc_float(x[0]), bc_float(x[1]), bc_float(x[2]), bc_float(x[3]));
  }
};

DEVICE const float* row_initial(const Params& p, const Unit& at) {
  return p.initial ? p.initial + at.row * p.initial_row : nullptr;
}

// Does a document start at token first + lane (of a tile)?
DEVICE bool document_starts(const Params& p, const Unit& at, int first, int lane) {
  int token = first + lane;
  if (!p.segments || lane >= TILE || token == 0 || token >= at.last) return false;
  const long long* id = p.segments + at.row * p.segment_row + token;
  return id[0] != id[-1];
}

DEVICE void unpack4(const float* from, float (&to)[4]) {
  float4 x = *(const float4*)from;
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// Where the lane's first item of the tile at token `first` lies.
DEVICE const Element* item_place(const Place& at, int first, const void* tensor, long long row, long long token) {
  return (const Element*)tensor + at.row * row + (first + at.sg) * token + at.channel;
}

// The lane's items of a tile: its two channels of tokens 4 i + sg. `otherwise`: of those not there.
DEVICE void load_items(const Params& p, const Place& at, int first, const Element* from, long long token_stride,
                       Element otherwise, Pair (&x)[QUADS]) {
#pragma unroll
  for (int i = 0; i < QUADS; i++, from += QUAD * token_stride) {
    bool valid = first + i * QUAD + at.sg < at.last;
#if EXACT
    x[i] = valid ? *(const Pair*)from : pack_elements(otherwise, otherwise);
#else
    x[i] = pack_elements(valid && at.channel < p.channels ? from[0] : otherwise,
                         valid && at.channel + 1 < p.channels ? from[1] : otherwise);
#endif
  }
}

DEVICE void load_items_at(const Params& p, const Place& at, int first, const void* tensor, long long row,
                          long long token, Element otherwise, Pair (&x)[QUADS]) {
  load_items(p, at, first, item_place(at, first, tensor, row, token), token, otherwise, x);
}

DEVICE void load_channels(const Params& p, const Place& at, const float* from, float (&x)[2]) {
#pragma unroll
  for (int c = 0; c < 2; c++) x[c] = EXACT || at.channel + c < p.channels ? from[at.channel + c] : 0.f;
}

DEVICE float sum_tokens(float x) {  // over the lanes of a pair of channels
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
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

// What a chunk that was run on its own adds, the sum of its delta, and whether a state passes through it.
DEVICE void store_chunk(const Params& p, const Place& at, const float (&h)[8], const float (&total)[2],
                        bool any_start) {
  store_private(p.carry + at.carry(p, at.chunk), h);
  float x = sum_tokens(total[0]), y = sum_tokens(total[1]);
  float* to = p.sum_delta + ((long long)(at.chunk * p.batch + at.row) * p.blocks + at.block) * BLOCK_CHANNELS;
  if (at.sg == 0) to[at.pair * 2] = x, to[at.pair * 2 + 1] = y;
  if (at.block == 0 && threadIdx.x == 0) p.keep[at.chunk * p.batch + at.row] = !any_start;
}
