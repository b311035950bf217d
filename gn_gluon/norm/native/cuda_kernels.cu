// Group Normalization with ReLU and residual add fused, forward and backward, for NVIDIA GPUs from sm_50 on; see
// group_norm.h for the formula. Plain layout (N, C, pixels), in which a group is one stretch of memory. cuda_launch.cc
// compiles this file when it is first needed (NVRTC: no header but the built-in ones) and launches it.
//
// A team of threads copies a chunk of a group into shared memory, and everything after that happens there: x is read
// from the GPU's memory once. A group that fits is one chunk. A larger one, or one of few, is several, whose teams run
// at the same time and tell each other their sums through memory; where not even that holds a group, it is read twice,
// by two launches. Sums are made in a fixed order: results repeat bit for bit.
//
// All arithmetic is float32. Values are centred before they are squared, by a float32 near the mean, and what that
// float32 leaves out of the mean is added where the digits are not lost.

// A host compiler reads no further than these structures.
enum Stage { kWhole, kSums, kRest };  // one launch, or the first and the second of two

struct Split {
  long long group_size;    // values of a group
  long long all_chunks;    // of all groups of all samples
  int samples, channels, groups, pixels;
  int chunk;               // values of a chunk; the last one of a group may have fewer
  int chunks;              // of a group
  int segments;            // a segment is what a chunk holds of one channel: so many at most
  int team;                // threads: a warp, several of which share a block, or the whole block
  int team_bytes;          // of shared memory
  int lanes, parts;        // backward: each of `parts` sums of a segment is made by `lanes` threads; powers of two
  Stage stage;
  float* chunk_sums;       // (all_chunks, 3), with several chunks; backward uses two of the three
  float* segment_sums;     // (all_chunks, segments, 2): parts of dgamma and dbeta; or null
  unsigned* tickets;       // 1 + samples * groups zeros where teams wait for each other; or null
};

struct ForwardArrays {
  const void *x, *residual;  // residual may be null
  const float *gamma, *beta;
  void* y;
  float *mean, *rstd;        // (2, N, G): the value, and what float32 leaves out of it
  float epsilon;
  bool relu;
};

struct BackwardArrays {
  const void *dy, *x, *y;    // y: with both relu and residual
  const float *gamma, *beta, *mean, *rstd;
  void *dx, *dresidual;      // may be null
  bool relu, residual;
};

struct ParameterGradients {
  float *dgamma, *dbeta;     // may be null
};

const int kMaxTeam = 512, kReduceThreads = 1024;
const int kBatch = 4;  // loads that a thread has under way at once, where they pass through registers
const int kScratch = 2 * 32 * 3 * 4 + 16;  // bytes of shared memory in front of the teams' own

#if defined(__CUDACC__) || defined(SHARED_MEMORY)

#ifdef __CUDACC__
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

__device__ inline float half_to_float(unsigned short half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

__device__ inline unsigned short float_to_half(float value) {
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

__device__ inline void rest() {
#if __CUDA_ARCH__ >= 700
  __nanosleep(100);
#endif
}

// Copies of 4 or 16 bytes into shared memory, of which a thread may use its own after copies_done().
#if __CUDA_ARCH__ >= 800
const bool kAsynchronous = true;
template <int kBytes>
__device__ void copy(const void* from, void* to) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(address), "l"(from) : "memory");
}
__device__ inline void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
const bool kAsynchronous = false;
template <int kBytes>
__device__ void copy(const void*, void*) {}
__device__ inline void copies_done() {}
#endif
#endif

// ------------------------------------------------------------------------------------------- types

// How a type is stored, alone and in 32-bit words; `kWide` values make 16 bytes.
struct Float32 {
  typedef float Stored;
  static const int kWide = 4;
  __device__ static float widen(float value) { return value; }
  __device__ static float narrow(float value) { return value; }
  __device__ static void widen_word(unsigned word, float* values) { values[0] = __uint_as_float(word); }
  __device__ static unsigned narrow_word(const float* values) { return __float_as_uint(values[0]); }
};

struct Float16 {
  typedef unsigned short Stored;
  static const int kWide = 8;
  __device__ static float widen(Stored stored) { return half_to_float(stored); }
  __device__ static Stored narrow(float value) { return float_to_half(value); }
  __device__ static void widen_word(unsigned word, float* values) {
    values[0] = widen(static_cast<Stored>(word));
    values[1] = widen(static_cast<Stored>(word >> 16));
  }
  __device__ static unsigned narrow_word(const float* values) {
#if __CUDA_ARCH__ >= 800
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return narrow(values[0]) | static_cast<unsigned>(narrow(values[1])) << 16;
#endif
  }
};

struct BFloat16 {
  typedef unsigned short Stored;
  static const int kWide = 8;
  __device__ static float widen(Stored stored) { return __uint_as_float(static_cast<unsigned>(stored) << 16); }
  __device__ static Stored narrow(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return static_cast<Stored>(bits >> 16 | 0x40);  // rounding could carry a NaN into infinity
    return static_cast<Stored>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  __device__ static void widen_word(unsigned word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static unsigned narrow_word(const float* values) {
#if __CUDA_ARCH__ >= 800
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return narrow(values[0]) | static_cast<unsigned>(narrow(values[1])) << 16;
#endif
  }
};

// What a thread loads and stores at once: 16 bytes, or, where rows are not aligned to that, one value.
template <class Type, int kWidth>
struct Vector {
  uint4 words;
  __device__ void read(float (&values)[kWidth]) const {
    const uint4 whole = words;  // one access, not four
    Type::widen_word(whole.x, values);
    Type::widen_word(whole.y, values + kWidth / 4);
    Type::widen_word(whole.z, values + kWidth / 2);
    Type::widen_word(whole.w, values + kWidth / 4 * 3);
  }
  __device__ void write(const float (&values)[kWidth]) {
    words.x = Type::narrow_word(values);
    words.y = Type::narrow_word(values + kWidth / 4);
    words.z = Type::narrow_word(values + kWidth / 2);
    words.w = Type::narrow_word(values + kWidth / 4 * 3);
  }
};

template <class Type>
struct Vector<Type, 1> {
  typename Type::Stored stored;
  __device__ void read(float (&values)[1]) const { values[0] = Type::widen(stored); }
  __device__ void write(const float (&values)[1]) { stored = Type::narrow(values[0]); }
};

// ------------------------------------------------------------------------------------------- teams and chunks

// The threads that work on a chunk.
struct Team {
  int size, rank;
  float* scratch;  // two turns of 3 sums of up to 32 warps
  int turn;

  __device__ void sync() const {
    if (size == 32) __syncwarp();
    else __syncthreads();
  }

  // The sums over the team, the same in every thread.
  template <int kCount>
  __device__ void sum(float (&values)[kCount]) {
    for (int offset = 16; offset; offset /= 2)
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
    if (size == 32) return;
    float* sums = scratch + turn * 32 * 3;  // in turn, so that a fast warp disturbs no slow one's reading
    turn ^= 1;
    const int lane = rank % 32;
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[rank / 32 * 3 + i] = values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = lane < size / 32 ? sums[lane * 3 + i] : 0.f;
    for (int offset = 16; offset; offset /= 2)
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
  }
};

// Into shared memory; done after copies_done().
template <class V>
__device__ void start_copy(const V* from, V* to, int count, const Team& team) {
  if (kAsynchronous && sizeof(V) >= 4) {  // all of it under way at once, past the registers
    for (int i = team.rank; i < count; i += team.size) copy<sizeof(V)>(from + i, to + i);
  } else {
    for (int i = team.rank; i < count; i += kBatch * team.size) {
      V batch[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (i + b * team.size < count) batch[b] = from[i + b * team.size];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (i + b * team.size < count) to[i + b * team.size] = batch[b];
    }
  }
}

struct Chunk {
  long long index, group;  // among all chunks; among all samples' groups
  long long begin;         // in its group
  long long offset;        // in the array
  int number;              // in its group
  int length;
  int first_channel;       // of its group, in the array
  unsigned char* memory;
};

// Which chunk is this team's; false if there is none.
__device__ inline bool find_chunk(const Split& split, unsigned char* memory, Team* team, Chunk* chunk) {
  team->size = split.team;
  team->rank = threadIdx.x % split.team;
  team->scratch = reinterpret_cast<float*>(memory);
  team->turn = 0;
  const int teams = blockDim.x / split.team, number = threadIdx.x / split.team;
  chunk->index = static_cast<long long>(blockIdx.x) * teams + number;
  if (split.tickets) {
    // Blocks need not start in their order: a ticket makes those that wait for each other start together.
    unsigned* ticket = reinterpret_cast<unsigned*>(memory + kScratch - 16);
    if (threadIdx.x == 0) *ticket = atomicAdd(split.tickets, 1u);
    __syncthreads();
    chunk->index = *ticket;
  }
  if (chunk->index >= split.all_chunks) return false;
  chunk->group = chunk->index / split.chunks;
  chunk->number = static_cast<int>(chunk->index % split.chunks);
  chunk->begin = static_cast<long long>(chunk->number) * split.chunk;
  chunk->offset = chunk->group * split.group_size + chunk->begin;
  const long long rest = split.group_size - chunk->begin;
  chunk->length = rest < split.chunk ? static_cast<int>(rest) : split.chunk;
  chunk->first_channel = static_cast<int>(chunk->group % split.groups) * (split.channels / split.groups);
  chunk->memory = memory + kScratch + number * split.team_bytes;
  return true;
}

// Tells the other teams of the group this chunk's sums.
template <int kCount>
__device__ void publish(const Split& split, const Team& team, const Chunk& chunk, const float (&sums)[kCount]) {
  if (team.rank == 0)
    for (int i = 0; i < kCount; ++i) split.chunk_sums[chunk.index * 3 + i] = sums[i];
}

// Waits for the sums of all chunks of the group, and returns them. volatile: other multiprocessors wrote them.
__device__ inline const volatile float* await(const Split& split, const Team& team, const Chunk& chunk) {
  if (split.tickets) {
    if (team.rank == 0) {
      unsigned* arrived = split.tickets + 1 + chunk.group;
      __threadfence();
      atomicAdd(arrived, 1u);
      while (*static_cast<volatile unsigned*>(arrived) < static_cast<unsigned>(split.chunks)) rest();
      __threadfence();
    }
    team.sync();
  }
  return split.chunk_sums + chunk.group * split.chunks * 3;
}

// Which channel of the group, and which of its pixels, a thread is at.
struct Cursor {
  int channel;
  unsigned pixel, pixels, pixel_step;
  int channel_step;

  __device__ Cursor(const Split& split, long long position, int step)
      : channel(static_cast<int>(position / split.pixels)),
        pixel(static_cast<unsigned>(position % split.pixels)),
        pixels(split.pixels),
        pixel_step(static_cast<unsigned>(step % split.pixels)),
        channel_step(step / split.pixels) {}

  __device__ void advance() {
    channel += channel_step;
    pixel += pixel_step;
    if (pixel >= pixels) {
      pixel -= pixels;
      ++channel;
    }
  }
};

// y = (x - mean) * scale + shift for a channel; forward and backward compute the same to the last bit, for its sign.
struct Affine {
  float mean, rest_of_mean, rstd;
  const float *gamma, *beta;  // of the group's first channel

  __device__ void of(int channel, float* scale, float* shift) const {
    *scale = rstd * __ldg(gamma + channel);
    *shift = fmaf(-rest_of_mean, *scale, __ldg(beta + channel));
  }

  // Those of the values from a cursor's pixel on. kCrosses: they may be of two channels, but not of more.
  template <bool kCrosses, int kWidth>
  __device__ void of(const Cursor& at, float (&scale)[kWidth], float (&shift)[kWidth]) const {
    const unsigned left = kCrosses ? at.pixels - at.pixel : kWidth;
    float next_scale = 0.f, next_shift = 0.f;
    of(at.channel, &scale[0], &shift[0]);
    if (left < kWidth) of(at.channel + 1, &next_scale, &next_shift);
#pragma unroll
    for (int i = 1; i < kWidth; ++i) {
      scale[i] = i < left ? scale[0] : next_scale;
      shift[i] = i < left ? shift[0] : next_shift;
    }
  }
};

// ------------------------------------------------------------------------------------------- forward

// Mean and squared distances of a group: mean = centre + rest.
struct Moments {
  float centre, rest, squares;
};

// Of the chunk that the team has copied.
template <class Type, int kWidth>
__device__ Moments chunk_moments(const Vector<Type, kWidth>* kept, int vectors, Team& team) {
  // The centre may be any number within a few deviations of the mean. Of the 16-bit types, which have fewer digits to
  // lose, each 16 bytes' first value is enough: at worst, 9 times the variance is summed and the surplus subtracted.
  const int samples = sizeof(typename Type::Stored) == 4 ? kWidth : 1;
  float total[1] = {0.f};
  for (int i = team.rank; i < vectors; i += team.size) {
    float values[kWidth];
    kept[i].read(values);
#pragma unroll
    for (int j = 0; j < samples; ++j) total[0] += values[j];
  }
  team.sum(total);
  const float centre = total[0] / (static_cast<float>(vectors) * samples);
  float sums[2] = {0.f, 0.f};
  for (int i = team.rank; i < vectors; i += team.size) {
    float values[kWidth];
    kept[i].read(values);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float distance = values[j] - centre;
      sums[0] += distance;
      sums[1] = fmaf(distance, distance, sums[1]);
    }
  }
  team.sum(sums);
  const float rest = sums[0] / (static_cast<float>(vectors) * kWidth), squares = fmaf(-sums[0], rest, sums[1]);
  return Moments{centre, rest, squares < 0.f ? 0.f : squares};  // NaN stays NaN
}

// The moments of the group from those of its chunks (Chan et al. 1979), all centred by the first one's centre.
__device__ inline Moments merge_moments(const Split& split, const volatile float* sums, Team& team) {
  const float centre = sums[0], size = static_cast<float>(split.group_size);
  float rest[1] = {0.f}, squares[1] = {0.f};
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = team.rank; i < split.chunks; i += team.size) {
      const long long left = split.group_size - static_cast<long long>(i) * split.chunk;
      const float count = static_cast<float>(left < split.chunk ? left : split.chunk);
      const float distance = (sums[3 * i] - centre) + sums[3 * i + 1];
      if (pass == 0) rest[0] += distance * (count / size);
      else squares[0] += fmaf(count * (distance - rest[0]), distance - rest[0], sums[3 * i + 2]);
    }
    if (pass == 0) team.sum(rest);
  }
  team.sum(squares);
  return Moments{centre, rest[0], squares[0]};
}

// y from the kept x.
template <class Type, int kWidth, bool kCrosses, bool kResidual>
__device__ void normalize(const Split& split, const Chunk& chunk, const Team& team, const Affine& affine, bool relu,
                          const Vector<Type, kWidth>* kept, const Vector<Type, kWidth>* residual,
                          Vector<Type, kWidth>* y) {
  typedef Vector<Type, kWidth> V;
  const int batch = kResidual ? kBatch : 1, vectors = chunk.length / kWidth;
  Cursor at(split, chunk.begin + team.rank * kWidth, team.size * kWidth);
  for (int i = team.rank; i < vectors; i += batch * team.size) {
    V added[batch];
    if (kResidual)
#pragma unroll
      for (int b = 0; b < batch; ++b)
        if (i + b * team.size < vectors) added[b] = residual[i + b * team.size];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (i + b * team.size >= vectors) break;
      float values[kWidth], more[kWidth], scale[kWidth], shift[kWidth];
      kept[i + b * team.size].read(values);
      if (kResidual) added[b].read(more);
      affine.of<kCrosses>(at, scale, shift);
      at.advance();
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        values[j] = fmaf(values[j] - affine.mean, scale[j], shift[j]);
        if (kResidual) values[j] += more[j];
        if (relu) values[j] = values[j] < 0.f ? 0.f : values[j];  // NaN stays NaN
      }
      V out;
      out.write(values);
      y[i + b * team.size] = out;
    }
  }
}

template <class Type, int kWidth, bool kCrosses>
__device__ void forward(const Split& split, const ForwardArrays& a) {
  typedef Vector<Type, kWidth> V;
  SHARED_MEMORY(memory);
  Team team;
  Chunk chunk;
  if (!find_chunk(split, memory, &team, &chunk)) return;
  V* kept = reinterpret_cast<V*>(chunk.memory);
  const long long first = chunk.offset / kWidth;
  start_copy(static_cast<const V*>(a.x) + first, kept, chunk.length / kWidth, team);
  copies_done();
  Moments moments;
  if (split.stage != kRest) {
    moments = chunk_moments(kept, chunk.length / kWidth, team);
    const float sums[3] = {moments.centre, moments.rest, moments.squares};
    if (split.chunks > 1) publish(split, team, chunk, sums);
    if (split.stage == kSums) return;
  }
  if (split.chunks > 1) moments = merge_moments(split, await(split, team, chunk), team);

  Affine affine;
  affine.mean = moments.centre + moments.rest;
  affine.rest_of_mean = (moments.centre - affine.mean) + moments.rest;
  affine.rstd = 1.f / sqrtf(moments.squares / static_cast<float>(split.group_size) + a.epsilon);
  affine.gamma = a.gamma + chunk.first_channel;
  affine.beta = a.beta + chunk.first_channel;
  if (chunk.number == 0 && team.rank == 0) {
    const long long all = static_cast<long long>(split.samples) * split.groups;
    a.mean[chunk.group] = affine.mean;
    a.mean[all + chunk.group] = affine.rest_of_mean;
    a.rstd[chunk.group] = affine.rstd;
    a.rstd[all + chunk.group] = 0.f;  // what is left out is less than the error of the variance
  }
  V* y = static_cast<V*>(a.y) + first;
  if (a.residual)
    normalize<Type, kWidth, kCrosses, true>(split, chunk, team, affine, a.relu, kept,
                                            static_cast<const V*>(a.residual) + first, y);
  else
    normalize<Type, kWidth, kCrosses, false>(split, chunk, team, affine, a.relu, kept, nullptr, y);
}

// ------------------------------------------------------------------------------------------- backward

// dy where y > 0 into shared memory, and to dresidual (or null).
template <class V, int kWidth>
__device__ void copy_masked(const V* dy, const V* y, V* kept, V* dresidual, int vectors, const Team& team) {
  for (int i = team.rank; i < vectors; i += kBatch * team.size) {
    V batch_dy[kBatch], batch_y[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * team.size < vectors) {
        batch_dy[b] = dy[i + b * team.size];
        if (y) batch_y[b] = y[i + b * team.size];
      }
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * team.size < vectors) {
        if (y) {
          float values[kWidth], gradients[kWidth];
          batch_y[b].read(values);
          batch_dy[b].read(gradients);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) gradients[j] = values[j] <= 0.f ? 0.f : gradients[j];
          batch_dy[b].write(gradients);
        }
        kept[i + b * team.size] = batch_dy[b];
        if (dresidual) dresidual[i + b * team.size] = batch_dy[b];
      }
  }
}

// The sums of dy and of dy * (x - mean) over each segment, in `parts` parts: table (segments, parts, 2). Where vectors
// cross channels they are read as single values, V is Vector<Type, 1>; length and pixels are counted in V.
template <class V, int kWidth>
__device__ void sum_segments(const Split& split, const Team& team, const Affine& affine, bool masked_by_x,
                             int first_channel, unsigned first_pixel, int segments, unsigned length, unsigned pixels,
                             const V* x, const V* dy, float* table) {
  const int slots = team.size / split.lanes, lane = team.rank % split.lanes, stride = split.parts * split.lanes;
  const int part = team.rank / split.lanes % split.parts, all = segments * split.parts;
  // A warp stays together for its shuffles: it goes on while its first slot has work.
  for (int first = team.rank / 32 * 32 / split.lanes; first < all; first += slots) {
    const int mine = first + team.rank % 32 / split.lanes, segment = mine / split.parts;
    const int start = static_cast<int>(segment * pixels - first_pixel);  // < 0: begins before the chunk
    const unsigned rest = length - start;
    const int end = mine < all ? start + static_cast<int>(rest < pixels ? rest : pixels) : 0;
    float sum = 0.f, product = 0.f, scale = 0.f, shift = 1.f;
    if (masked_by_x && mine < all) affine.of(first_channel + segment, &scale, &shift);
#pragma unroll 2
    for (int i = (start < 0 ? 0 : start) + part * split.lanes + lane; i < end; i += stride) {
      float values[kWidth], gradients[kWidth];
      x[i].read(values);
      dy[i].read(gradients);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float distance = values[j] - affine.mean;
        if (masked_by_x && fmaf(distance, scale, shift) <= 0.f) gradients[j] = 0.f;
        sum += gradients[j];
        product = fmaf(gradients[j], distance, product);
      }
    }
    for (int offset = split.lanes / 2; offset; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      product += __shfl_xor_sync(0xffffffffu, product, offset);
    }
    if (lane == 0 && mine < all) {
      table[2 * mine] = sum;
      table[2 * mine + 1] = product;
    }
  }
}

// With d = dy masked, x_hat = (x - mean) * rstd and averages over the group:
//   dx = rstd * (gamma * d - average(gamma * d) - x_hat * average(gamma * d * x_hat))
template <class Type, int kWidth, bool kCrosses>
__device__ void backward(const Split& split, const BackwardArrays& a) {
  typedef Vector<Type, kWidth> V;
  typedef typename Type::Stored Stored;
  SHARED_MEMORY(memory);
  Team team;
  Chunk chunk;
  if (!find_chunk(split, memory, &team, &chunk)) return;
  const long long all = static_cast<long long>(split.samples) * split.groups;
  Affine affine;
  affine.mean = a.mean[chunk.group];
  affine.rest_of_mean = a.mean[all + chunk.group];
  affine.rstd = a.rstd[chunk.group];
  affine.gamma = a.gamma + chunk.first_channel;
  affine.beta = a.beta + chunk.first_channel;

  const int array_bytes = (split.chunk * static_cast<int>(sizeof(Stored)) + 15) / 16 * 16;
  V *kept_x = reinterpret_cast<V*>(chunk.memory), *kept_dy = reinterpret_cast<V*>(chunk.memory + array_bytes);
  float* table = reinterpret_cast<float*>(chunk.memory + 2 * array_bytes);
  const int vectors = chunk.length / kWidth;
  const long long at_vector = chunk.offset / kWidth;
  start_copy(static_cast<const V*>(a.x) + at_vector, kept_x, vectors, team);
  const V* dy = static_cast<const V*>(a.dy) + at_vector;
  if (a.residual)
    copy_masked<V, kWidth>(dy, a.relu ? static_cast<const V*>(a.y) + at_vector : nullptr, kept_dy,
                           a.dresidual && split.stage != kSums ? static_cast<V*>(a.dresidual) + at_vector : nullptr,
                           vectors, team);
  else
    start_copy(dy, kept_dy, vectors, team);
  copies_done();
  team.sync();
  // Without a residual x tells the sign of y: one array less to read.
  const bool masked_by_x = a.relu && !a.residual;
  const int first_channel = static_cast<int>(chunk.begin / split.pixels);
  const int segments = static_cast<int>((chunk.begin + chunk.length - 1) / split.pixels) - first_channel + 1;
  const int values = kCrosses ? 1 : kWidth;  // in a vector of sum_segments
  typedef Vector<Type, kCrosses ? 1 : kWidth> S;
  sum_segments<S, kCrosses ? 1 : kWidth>(
      split, team, affine, masked_by_x, first_channel, static_cast<unsigned>(chunk.begin % split.pixels) / values,
      segments, chunk.length / values, split.pixels / values, reinterpret_cast<const S*>(kept_x),
      reinterpret_cast<const S*>(kept_dy), table);
  team.sync();

  // of gamma * dy, and of gamma * dy * (x - mean): over segments, then over chunks
  float totals[2] = {0.f, 0.f};
  float* segment_sums = split.stage == kSums || !split.segment_sums
      ? nullptr : split.segment_sums + chunk.index * split.segments * 2;
  for (int segment = team.rank; segment < segments; segment += team.size) {
    float sum = 0.f, product = 0.f;
#pragma unroll 1
    for (int part = 0; part < split.parts; ++part) {
      sum += table[2 * (segment * split.parts + part)];
      product += table[2 * (segment * split.parts + part) + 1];
    }
    product = fmaf(-affine.rest_of_mean, sum, product);
    const float gamma = __ldg(affine.gamma + first_channel + segment);
    totals[0] = fmaf(gamma, sum, totals[0]);
    totals[1] = fmaf(gamma, product, totals[1]);
    if (segment_sums) {
      segment_sums[2 * segment] = product * affine.rstd;
      segment_sums[2 * segment + 1] = sum;
    }
  }
  team.sum(totals);
  if (split.chunks > 1) {
    if (split.stage != kRest) publish(split, team, chunk, totals);
    if (split.stage == kSums) return;
    const volatile float* sums = await(split, team, chunk);
    totals[0] = totals[1] = 0.f;
    for (int i = team.rank; i < split.chunks; i += team.size) {
      totals[0] += sums[3 * i];
      totals[1] += sums[3 * i + 1];
    }
    team.sum(totals);
  }
  if (!a.dx) return;

  const float size = static_cast<float>(split.group_size);
  const float from_x = -affine.rstd * (affine.rstd * (affine.rstd * (totals[1] / size)));
  const float constant = fmaf(-affine.rstd, totals[0] / size, -from_x * affine.rest_of_mean);
  V* dx = static_cast<V*>(a.dx) + at_vector;
  Cursor at(split, chunk.begin + team.rank * kWidth, team.size * kWidth);
  for (int i = team.rank; i < vectors; i += team.size) {
    float values[kWidth], gradients[kWidth], scale[kWidth], shift[kWidth];
    kept_x[i].read(values);
    kept_dy[i].read(gradients);
    affine.of<kCrosses>(at, scale, shift);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float distance = values[j] - affine.mean;
      if (masked_by_x && fmaf(distance, scale[j], shift[j]) <= 0.f) gradients[j] = 0.f;
      values[j] = fmaf(gradients[j], scale[j], fmaf(distance, from_x, constant));
    }
    at.advance();
    V out;
    out.write(values);
    dx[i] = out;
  }
}

// dgamma and dbeta from the segments' sums: 32 channels a block, 32 threads for each.
__device__ inline void reduce(const Split& split, const ParameterGradients& a) {
  SHARED_MEMORY(memory);
  float* table = reinterpret_cast<float*>(memory);  // (2, 32 rows, 33): the 33rd keeps columns in different banks
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const int channel = blockIdx.x * 32 + lane, group_channels = split.channels / split.groups;
  float sums[2] = {0.f, 0.f};
  if (channel < split.channels) {
    const int group = channel / group_channels, in_group = channel % group_channels;
    const long long start = static_cast<long long>(in_group) * split.pixels;
    const unsigned first = static_cast<unsigned>(start / split.chunk);
    const unsigned count = static_cast<unsigned>((start + split.pixels - 1) / split.chunk) - first + 1;
    // In its first chunk the channel comes after others; a later one begins within the channel.
    const int segment = in_group - static_cast<int>(static_cast<long long>(first) * split.chunk / split.pixels);
#pragma unroll 4
    for (unsigned i = row; i < split.samples * count; i += 32) {
      const long long sample = i / count;
      const unsigned number = i % count;
      const long long index = (sample * split.groups + group) * split.chunks + first + number;
      const float* from = split.segment_sums + (index * split.segments + (number ? 0 : segment)) * 2;
      sums[0] += from[0];
      sums[1] += from[1];
    }
  }
  for (int i = 0; i < 2; ++i) table[(i * 32 + row) * 33 + lane] = sums[i];
  __syncthreads();
  const int summed = blockIdx.x * 32 + row;  // now a warp is a channel
  for (int i = 0; i < 2; ++i) {
    float sum = table[(i * 32 + lane) * 33 + row];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    float* out = i ? a.dbeta : a.dgamma;
    if (lane == 0 && summed < split.channels && out) out[summed] = sum;
  }
}

// ------------------------------------------------------------------------------------------- what is launched

// STORED: Float32, Float16 or BFloat16. whole: 16 bytes at once, always of one channel; crossing: perhaps of two;
// single: value by value.
#define KERNEL(name, arrays, call)                                                              \
  extern "C" __global__ void __launch_bounds__(kMaxTeam, 2) name(Split split, arrays tensors) { \
    call(split, tensors);                                                                       \
  }
KERNEL(forward_whole, ForwardArrays, (forward<STORED, STORED::kWide, false>))
KERNEL(forward_crossing, ForwardArrays, (forward<STORED, STORED::kWide, true>))
KERNEL(forward_single, ForwardArrays, (forward<STORED, 1, false>))
KERNEL(backward_whole, BackwardArrays, (backward<STORED, STORED::kWide, false>))
KERNEL(backward_crossing, BackwardArrays, (backward<STORED, STORED::kWide, true>))
KERNEL(backward_single, BackwardArrays, (backward<STORED, 1, false>))

extern "C" __global__ void __launch_bounds__(kReduceThreads) reduce_parameters(Split split, ParameterGradients arrays) {
  reduce(split, arrays);
}

#endif
