// A block of a CUDA kernel on a CPU: every thread a fiber, switched at barriers and at the exchanges of a warp.
//
// Included before the kernels' sources with -D SCAN_HOST; supplies what their first section takes from CUDA. Blocks run
// one after another by rising number, so a block never waits for one that has not run. Shared memory starts as NaN.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <vector>

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::min;

constexpr int MOST_THREADS = 128;
static int block_threads;
struct Index { int x; };
static Index threadIdx, blockIdx;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
static std::vector<Fiber> fibers(MOST_THREADS);
static ucontext_t scheduler;
static Barrier block_barrier, warp_barriers[MOST_THREADS / 32];
static float exchange[MOST_THREADS / 32][2][8][32];
static unsigned exchanges[MOST_THREADS];
static std::vector<float> shared_memory;

inline void arrive(Barrier& barrier, int size) {
  unsigned generation = barrier.generation;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    barrier.generation++;
    return;
  }
  int self = threadIdx.x;
  while (barrier.generation == generation) {
    swapcontext(&fibers[self].context, &scheduler);
    threadIdx.x = self;
  }
}

// Hand `count` numbers of this lane to its warp; returns the warp's, [count][32], valid until the next but one call.
inline float (*share(const float* mine, int count))[32] {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = exchanges[threadIdx.x]++ & 1;
  for (int i = 0; i < count; i++) exchange[warp][turn][i][lane] = mine[i];
  arrive(warp_barriers[warp], 32);
  return exchange[warp][turn];
}

#define DEVICE inline
#define SHARED(name) float* name = shared_memory.data()
#define KERNEL(name) static void name(const Params& p)
inline void sync_block() { arrive(block_barrier, block_threads); }
inline void sync_warp() { arrive(warp_barriers[threadIdx.x / 32], 32); }
inline float ex2(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float from_bits(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned to_bits(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline unsigned bf16_bits(float x) {
  unsigned b = to_bits(x);
  return x != x ? 0x7fffu : (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
}
inline unsigned pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float shuffle_xor(float x, int bit) { return share(&x, 1)[0][threadIdx.x % 32 ^ bit]; }
inline unsigned vote(bool x) {
  float mine = x;
  float(*all)[32] = share(&mine, 1);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)(all[0][i] != 0.f) << i;
  return bits;
}
inline float tf32(float x) { return from_bits(to_bits(x) & 0xffffe000u); }
inline void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  float mine[6] = {a0, a1, a2, a3, b0, b1};
  float(*all)[32] = share(mine, 6);
  int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; k++)
      sum += (double)tf32(all[i / 2 + k / 4 * 2][row * 4 + k % 4]) * tf32(all[4 + k / 4][column * 4 + k % 4]);
    d[i] = (float)sum;
  }
}
inline int take_ticket(int* counter) { return (*counter)++; }
inline void wait_at_least(const int* flag, int value) {
  if (*flag < value) fprintf(stderr, "emulator: a block waits for one that has not run\n"), abort();
}
inline void publish(int* flag, int value) { *flag = value; }
inline void prefetch(const float*) {}
inline float4 load_shared_state(const float4* x) { return *x; }

template <typename P>
void run_blocks(void (*kernel)(const P&), const P& p, int blocks, int threads, int shared_bytes) {
  static void (*current)(const P&);
  static const P* argument;
  current = kernel, argument = &p, block_threads = threads;
  for (int block = 0; block < blocks; block++) {
    shared_memory.assign(shared_bytes / 4 + 1, NAN);
    block_barrier = Barrier();
    for (Barrier& b : warp_barriers) b = Barrier();
    blockIdx.x = block;
    for (int t = 0; t < block_threads; t++) {
      Fiber& f = fibers[t];
      f.stack.resize(1 << 16);
      f.done = false;
      exchanges[t] = 0;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &scheduler;
      makecontext(&f.context, (void (*)())(void (*)(int))[](int self) {
        threadIdx.x = self;
        current(*argument);
        fibers[self].done = true;
      }, 1, t);
    }
    for (bool busy = true; busy;) {
      busy = false;
      for (int t = 0; t < block_threads; t++) {
        if (fibers[t].done) continue;
        busy = true;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t].context);
      }
    }
  }
}
