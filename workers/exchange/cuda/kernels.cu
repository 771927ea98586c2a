// Dispatch and combine over windows (window.py): four kernels per MoE layer, all of which may be captured in a graph.
//
// A call has a number, the attempt's base + the layer. Numbers rise, also from one attempt to the next.
//   dispatch  writes the rows for each expert in use into its holder's window, then their number as `asked`.
//             There they lie by place without gaps: their holder adds up numbers to find them, as their owner did.
//   collect   waits for `asked` of every live rank, also of those that have no rows, and packs rows by expert.
//   reply     writes what the experts gave into the windows of the rows' owners, then `answered`.
//   combine   waits for `answered` of the holders of its rows alone, and sums in fp32 by ascending expert.
// Two banks of questions: a rank that needs no answer of a peer may begin the next call while that peer collects this
// one. It cannot begin the one after, for which it needs that peer's next `asked`. One bank of answers: a holder answers
// the next call only once it was asked, which an owner does when it has summed.
// Words are waited for with >=, so that none is waited for in vain; a number that is greater than it can be fails the call.
//
// The host calls attempts off by a word: calls with numbers below it are over. It rises only, so it needs no clearing.
// Block 0 of a kernel that waits is the only one that reads it, since reads of one line of the host's memory queue up
// (1 us each). It is block 0 because the first blocks get a place on the GPU whatever else waits there.
// What makes any block give up is in `failed` first, and blocks look at nothing else: an attempt of which some block left
// out a row is never taken for done. A call that failed writes no words, and what follows it in the graph finds garbage: so whatever ids, tables, words and
// rows hold, each kernel stays within its buffers and ends.
typedef unsigned long long u64;

enum Failure { ABORTED = 1, TOO_LATE = 2, OVERTAKEN = 4, UNCOVERED = 8, TOO_MANY = 16 };

struct Args {  // 64 bits each, in the order of calls.py
  const u64 *base, *masked;       // set by the host before an attempt; bit r: rank r is neither used nor waited for
  const u64 *called_off;          // in host memory: calls with smaller numbers are over
  u64 *failed;                    // why the attempt's results are worth nothing; 0: they are good
  u64 *ended;                     // blocks of this call's `collect` and `combine` that wait no more
  u64 layer, me, tokens, experts, limit_ns;
  const u64 *where;               // [experts]: rank << 32 | place of the replica in use; ~0: none
  const long long *held;          // [RANKS * HELD]: the expert in each place; -1: none
  const int *real;                // rows of the step, of which there are `tokens` with its padding
  const long long *ids;           // [tokens, TOP_K]
  const float *weights;           // [tokens, TOP_K]
  int *row_of;                    // [tokens, TOP_K]: which row of all that its holder is asked each pair is
  const uint4 *hidden;            // [tokens, CHUNKS]
  uint4 *packed;                  // [ROOM, CHUNKS]: group g is rows ends[g] to ends[g + 1]
  int *ends;                      // [HELD + 1]
  u64 *loads;                     // [HELD]: rows for each place since the host last looked
  int *starts, *sizes, *firsts;   // [RANKS * HELD]: where rows of each rank for each place are in `packed`, and there
  const uint4 *computed;          // [ROOM, CHUNKS]
  uint4 *out;                     // [tokens, CHUNKS]
  char *windows[8];
};

#define THREADS 256
#define WARPS (THREADS / 32)
#define WORDS (RANKS * HELD)
#define PAIRS (ROWS * TOP_K)
#define QUESTIONS(window, bank, rank) ((uint4 *)((window) + QUESTIONS_AT) + ((u64)(bank) * RANKS + (rank)) * PAIRS * CHUNKS)
#define ANSWERS(window, rank) ((uint4 *)((window) + ANSWERS_AT) + (u64)(rank) * PAIRS * CHUNKS)
#define ASKED(window, bank, at) ((u64 *)((window) + ASKED_AT) + (bank) * WORDS + (at))
#define ANSWERED(window, at) ((u64 *)((window) + ANSWERED_AT) + (at))
#define ROW_BITS 16

// Words in another process's reach are read and written at system scope.
__device__ __forceinline__ u64 peek(const u64 *p) {
  u64 v;
  asm volatile("ld.relaxed.sys.global.u64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u64 acquire(const u64 *p) {
  u64 v;
  asm volatile("ld.acquire.sys.global.u64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void release(u64 *p, u64 v) {
  asm volatile("st.release.sys.global.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0,%globaltimer;" : "=l"(t));
  return t;
}
__device__ __forceinline__ void fail(const Args &a, u64 why) { atomicOr(a.failed, why); }
__device__ __forceinline__ bool is_masked(const Args &a, u64 rank) { return *a.masked >> rank & 1; }
__device__ __forceinline__ u64 number_of(const Args &a) { return *a.base + a.layer; }

// The same answer for all threads of a block, which must all ask. Ends with a barrier.
__device__ __forceinline__ bool is_off(const Args &a) {
  __shared__ int off;
  if (threadIdx.x == 0) off = peek(a.failed) != 0;
  __syncthreads();
  return off;
}

// Waits until *word >> shift >= number; returns the word, or 0 once the attempt has failed.
__device__ __forceinline__ u64 await(const Args &a, const u64 *word, u64 number, int shift) {
  for (unsigned turn = 1; peek(word) >> shift < number; ++turn)
    if ((turn & 7) == 0 && peek(a.failed)) return 0;
  u64 found = acquire(word);
  return found >> shift == number ? found : (fail(a, OVERTAKEN), 0);
}

// Block 0 of a kernel that waits, until `others` blocks wait no more: the host's word and the time for all of them.
__device__ __forceinline__ void watch(const Args &a, u64 others) {
  if (threadIdx.x != 0) return;
  u64 begun = now_ns(), number = number_of(a);
  for (unsigned turn = 0; peek(a.ended) < others; ++turn) {
    if (turn < 16) continue;
    u64 why = peek(a.called_off) > number ? ABORTED : now_ns() - begun > a.limit_ns ? TOO_LATE : 0;
    if (why) return fail(a, why);
  }
}
__device__ __forceinline__ void wait_no_more(const Args &a) {
  if (threadIdx.x == 0) atomicAdd(a.ended, 1ull);
}

// `count` rows, four in flight; from(r) is where row r is.
template <class From> __device__ __forceinline__ void copy_rows(uint4 *to, int count, From from) {
  for (int t = threadIdx.x; t < CHUNKS; t += THREADS) {
    int r = 0;
    for (; r + 4 <= count; r += 4) {
      uint4 v0 = from(r)[t], v1 = from(r + 1)[t], v2 = from(r + 2)[t], v3 = from(r + 3)[t];
      to[(u64)r * CHUNKS + t] = v0, to[(u64)(r + 1) * CHUNKS + t] = v1;
      to[(u64)(r + 2) * CHUNKS + t] = v2, to[(u64)(r + 3) * CHUNKS + t] = v3;
    }
    for (; r < count; ++r) to[(u64)r * CHUNKS + t] = from(r)[t];
  }
}

// Block: a rank and a place there.
extern "C" __global__ void __launch_bounds__(THREADS) dispatch(const __grid_constant__ Args a) {
  u64 rank = blockIdx.x / HELD, place = blockIdx.x % HELD, number = number_of(a);
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.ended = 0;
  long long expert = a.held[blockIdx.x];
  bool masked = is_masked(a, rank), used = expert >= 0 && expert < a.experts && a.where[expert] == (rank << 32 | place);
  int tokens = min(min(max(*a.real, 0), (int)a.tokens), ROWS), pairs = used ? tokens * TOP_K : 0;
  if (is_off(a) || masked) return;
  __shared__ int chosen[ROWS], of_warp[WARPS], before;
  if (threadIdx.x == 0) before = 0;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, found = 0, earlier = 0;
  int looks = (pairs + THREADS - 1) / THREADS, first = warp * looks * 32 + lane;  // each warp's pairs follow each other
#pragma unroll 4
  for (int i = 0; i < looks; ++i) {
    int pair = first + i * 32;
    long long id = pair < pairs ? a.ids[pair] : -1;
    u64 at = id >= 0 && id < a.experts ? a.where[id] : ~0ull;
    earlier += at >> 32 == rank && (at & 0xffffffff) < place;
    found += __popc(__ballot_sync(~0u, id == expert));
  }
  earlier = __reduce_add_sync(~0u, earlier);
  __syncthreads();
  if (lane == 0) of_warp[warp] = found, atomicAdd(&before, earlier);
  __syncthreads();
  int next = 0, count = 0;
  for (int w = 0; w < WARPS; ++w) next += w < warp ? of_warp[w] : 0, count += of_warp[w];
#pragma unroll 4
  for (int i = 0; i < looks; ++i) {
    int pair = first + i * 32;
    bool mine = pair < pairs && a.ids[pair] == expert;
    unsigned votes = __ballot_sync(~0u, mine);
    int row = next + __popc(votes & ((1u << lane) - 1));
    if (mine && row < ROWS) chosen[row] = pair / TOP_K, a.row_of[pair] = before + row;
    next += __popc(votes);
  }
  __syncthreads();
  if (count > ROWS || before + count > PAIRS) {  // only where a token names an expert twice
    if (threadIdx.x == 0) fail(a, TOO_MANY);
    return;
  }
  char *window = a.windows[rank];
  u64 bank = number & 1;
  uint4 *to = QUESTIONS(window, bank, a.me) + (u64)before * CHUNKS;
  copy_rows(to, count, [&](int r) { return a.hidden + (u64)chosen[r] * CHUNKS; });
  __syncthreads();
  if (threadIdx.x == 0) release(ASKED(window, bank, a.me * HELD + place), number << ROW_BITS | (unsigned)count);
}

// Block: 0, or 1 + the place of an expert that this rank holds.
extern "C" __global__ void __launch_bounds__(THREADS) collect(const __grid_constant__ Args a) {
  if (blockIdx.x == 0) return watch(a, HELD);
  int place = blockIdx.x - 1;
  u64 number = number_of(a), bank = number & 1;
  __shared__ int counts[RANKS], firsts[RANKS];  // of each rank's rows: for this place, and for places before it
  __shared__ int failed, all;
  if (threadIdx.x == 0) failed = all = 0;
  for (int rank = threadIdx.x; rank < RANKS; rank += THREADS) firsts[rank] = 0;
  u64 masked = *a.masked;
  bool off = is_off(a);
  int here = 0;
  for (int i = threadIdx.x; i < WORDS; i += THREADS) {
    int count = 0;
    if (!off && !(masked >> i / HELD & 1)) {
      u64 word = await(a, ASKED(a.windows[a.me], bank, i), number, ROW_BITS);
      if (word == 0) failed = 1;
      count = min((int)(word & ((1 << ROW_BITS) - 1)), ROWS);
    }
    if (i % HELD == place) counts[i / HELD] = count;
    here += count;
    if (count && i % HELD < place) atomicAdd(&firsts[i / HELD], count);
  }
  here = __reduce_add_sync(~0u, here);
  if (threadIdx.x % 32 == 0) atomicAdd(&all, here);
  __syncthreads();
  wait_no_more(a);
  int before = 0;
  bool many = all > ROOM;
  for (int rank = 0; rank < RANKS; ++rank) before += firsts[rank], many |= firsts[rank] + counts[rank] > PAIRS;
  bool bad = off || failed || many;
  if (many && threadIdx.x == 0) fail(a, TOO_MANY);
  int at = bad ? 0 : before;
  if (place == 0 && threadIdx.x == 0) a.ends[0] = 0;
  for (int rank = 0; rank < RANKS; ++rank) {
    int word = rank * HELD + place, count = bad ? 0 : counts[rank];
    if (threadIdx.x == 0) a.starts[word] = at, a.sizes[word] = count, a.firsts[word] = firsts[rank];
    const uint4 *from = QUESTIONS(a.windows[a.me], bank, rank) + (bad ? 0 : (u64)firsts[rank] * CHUNKS);
    copy_rows(a.packed + (u64)at * CHUNKS, count, [&](int r) { return from + (u64)r * CHUNKS; });
    at += count;
  }
  if (threadIdx.x == 0) a.ends[place + 1] = at, a.loads[place] += bad ? 0 : at - before;
}

// Block: a rank and the place of an expert that this rank holds.
extern "C" __global__ void __launch_bounds__(THREADS) reply(const __grid_constant__ Args a) {
  u64 rank = blockIdx.x / HELD, place = blockIdx.x % HELD;
  int count = a.sizes[blockIdx.x];
  bool masked = is_masked(a, rank);
  const uint4 *from = a.computed + (u64)a.starts[blockIdx.x] * CHUNKS;
  if (is_off(a) || !count || masked) return;
  uint4 *to = ANSWERS(a.windows[rank], a.me) + (u64)a.firsts[blockIdx.x] * CHUNKS;
  copy_rows(to, count, [&](int r) { return from + (u64)r * CHUNKS; });
  __syncthreads();
  if (threadIdx.x == 0) release(ANSWERED(a.windows[rank], a.me * HELD + place), number_of(a));
}

__device__ __forceinline__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ unsigned both(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The sum of one chunk of a token's TOP_K answers: products and sums are rounded by themselves, as in combine.py.
__device__ __forceinline__ uint4 weigh(const uint4 *const *parts, const float *weights, int t) {
  float sum[8];
  uint4 got[TOP_K];
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) got[k] = parts[k][t];
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    unsigned pairs[4] = {got[k].x, got[k].y, got[k].z, got[k].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float part = __fmul_rn(i & 1 ? high(pairs[i / 2]) : low(pairs[i / 2]), weights[k]);
      sum[i] = k ? __fadd_rn(sum[i], part) : part;
    }
  }
  return {both(sum[0], sum[1]), both(sum[2], sum[3]), both(sum[4], sum[5]), both(sum[6], sum[7])};
}

// Block: 0, or 1 + a token.
extern "C" __global__ void __launch_bounds__(THREADS) combine(const __grid_constant__ Args a) {
  if (blockIdx.x == 0) return watch(a, HELD + a.tokens);
  u64 token = blockIdx.x - 1, number = number_of(a);
  const long long *ids = a.ids + token * TOP_K;
  __shared__ int failed;
  __shared__ const uint4 *parts[TOP_K];
  __shared__ float weights[TOP_K];
  if (threadIdx.x == 0) failed = 0;
  bool real = (long long)token < *a.real;
  int k = threadIdx.x, order = 0, row = 0;
  u64 rank = RANKS, place = 0;
  float weight = 0;
  if (k < TOP_K && real) {
    long long id = ids[k];
    for (int i = 0; i < TOP_K; ++i) order += ids[i] < id || (ids[i] == id && i < k);
    u64 found = id >= 0 && id < a.experts ? a.where[id] : ~0ull;
    rank = found >> 32, place = found & 0xffffffff;
    row = a.row_of[token * TOP_K + k], weight = a.weights[token * TOP_K + k];
  }
  bool off = is_off(a);
  if (k < TOP_K && real && !off) {
    if (rank >= RANKS || place >= HELD || row < 0 || row >= PAIRS || is_masked(a, rank)) {
      fail(a, UNCOVERED), failed = 1;
    } else {
      if (!await(a, ANSWERED(a.windows[a.me], rank * HELD + place), number, 0)) failed = 1;
      parts[order] = ANSWERS(a.windows[a.me], rank) + (u64)row * CHUNKS;
      weights[order] = weight;
    }
  }
  __syncthreads();
  wait_no_more(a);
  bool good = real && !off && !failed;
  for (int t = threadIdx.x; t < CHUNKS; t += THREADS)
    a.out[token * CHUNKS + t] = good ? weigh(parts, weights, t) : make_uint4(0, 0, 0, 0);
}
