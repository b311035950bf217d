// A stand-in for a GPU, its driver and NVRTC: runs the kernels of cuda_kernels.cu on the CPU, thread by thread.
//
// A thread of the GPU is a fiber that runs until it waits for others. Then another one goes on, which the lot decides
// for each launch: any one, or those of one warp, as far as they get. What lacks a barrier sees memory that was not
// written yet, or was written anew. Blocks run in any order, as many at once as fit. It shows errors of indices,
// barriers and numerics; it shows nothing of speed, and not that a real GPU behaves the same.
//
//   g++ -std=c++17 -O1 -shared -fPIC -I gn_gluon/norm/native -o libcuda_on_cpu.so tests/cuda_on_cpu.cc
//   g++ -std=c++17 -O1 -shared -fPIC -I gn_gluon/norm/native -DSTORED=Float16 -o Float16.so tests/cuda_on_cpu.cc
//
// The second, for each type, is what the stand-in for NVRTC gives out as machine code, from the folder of the first.
// With -DREAL_NVRTC the first has no such stand-in, takes NVRTC's true machine code, and launches without running.
#include <cmath>
#include <cstdint>
#include <cstring>

struct Index { unsigned x; };
extern Index threadIdx, blockIdx, blockDim;
unsigned char* block_memory();
void wait_for_block();
void wait_for_warp();
float exchange(float value, int offset);
void let_others_run();

#ifdef STORED  // ------------------------------------------------------------------------------- the kernels

#define SHARED_MEMORY(name) unsigned char* name = block_memory()
#define __device__
#define __global__ __attribute__((visibility("default")))
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };

inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }

inline float half_to_float(unsigned short half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return half >> 15 ? -size : size;
}

inline unsigned short float_to_half(float value) {
  const unsigned short sign = std::signbit(value) << 15;
  if (value != value) return sign | 0x7fff;
  if (value == 0) return sign;
  int exponent;
  std::frexp(value, &exponent);
  exponent = std::fmax(exponent, -13);
  const float units = std::isinf(value) ? INFINITY : std::nearbyint(std::ldexp(std::fabs(value), 11 - exponent));
  if (std::ldexp(units, exponent - 11) > 65504) return sign | 0x7c00;
  // 1024 units carry the exponent along; below that they are a denormal number
  return sign | (exponent == -13 ? unsigned(units) : unsigned(units) + ((exponent + 13) << 10));
}

const bool kAsynchronous = false;
template <int kBytes>
void copy(const void*, void*) {}
inline void copies_done() {}
inline float __ldg(const float* from) { return *from; }
inline unsigned atomicAdd(unsigned* at, unsigned more) { const unsigned before = *at; *at += more; return before; }
inline void __threadfence() {}
inline void rest() { let_others_run(); }
inline void __syncthreads() { wait_for_block(); }
inline void __syncwarp() { wait_for_warp(); }
inline float __shfl_xor_sync(unsigned, float value, int offset) { return exchange(value, offset); }

#include "cuda_kernels.cu"

#else  // --------------------------------------------------------------------------------------- the GPU

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <list>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernels.cu"  // the arguments

Index threadIdx, blockIdx, blockDim;

namespace {

struct Fiber;

struct Barrier {
  int members = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  unsigned number;
  int live;
  std::vector<double> memory;  // aligned
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> exchanged;
};

struct Fiber {
  jmp_buf here;
  std::vector<char> stack;
  Block* block;
  unsigned thread;
  bool started;
};

constexpr int kLaunchFailed = 719, kTimeout = 702;
jmp_buf scheduler;
Fiber* current;
std::vector<Fiber*> ready;
const std::function<void()>* kernel;
std::string launches;
int multiprocessors = 4, multiprocessor_memory = 64 << 10, capability = 86, gpus = 1;
unsigned first_block = 0;
bool by_warps;
std::mt19937 lot(0);

void release(Barrier* barrier) {
  const unsigned last = lot() % 32;  // of the warps: it goes on first
  std::sort(barrier->waiting.begin(), barrier->waiting.end(), [last](const Fiber* a, const Fiber* b) {
    return (a->thread / 32 ^ last) < (b->thread / 32 ^ last);
  });
  ready.insert(ready.end(), barrier->waiting.begin(), barrier->waiting.end());
  barrier->waiting.clear();
}

void run_fiber() {
  (*kernel)();
  Block& block = *current->block;
  --block.live;
  for (Barrier* barrier : {&block.barrier, &block.warps[current->thread / 32]})  // who has left is not waited for
    if (--barrier->members == static_cast<int>(barrier->waiting.size())) release(barrier);
  current->block = nullptr;
  _longjmp(scheduler, 1);
}

void stop() {  // not by swapcontext, which asks the kernel each time
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

void wait(Barrier* barrier) {
  barrier->waiting.push_back(current);
  if (barrier->members == static_cast<int>(barrier->waiting.size())) release(barrier);
  stop();
}

void go_on(Fiber* fiber) {
  static ucontext_t start;
  current = fiber;
  threadIdx.x = fiber->thread;
  blockIdx.x = fiber->block->number;
  if (_setjmp(scheduler)) return;
  if (fiber->started) _longjmp(fiber->here, 1);
  fiber->started = true;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber->stack.data();
  start.uc_stack.ss_size = fiber->stack.size();
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

int run(unsigned blocks, unsigned threads, size_t memory, int at_once) {
  static std::list<Fiber> fibers;
  static std::vector<Fiber*> idle;
  std::list<Block> live;
  std::vector<unsigned> order;
  for (unsigned i = first_block; i < blocks; ++i) order.push_back(i);
  std::shuffle(order.begin(), order.end(), lot);
  ready.clear();
  by_warps = lot() % 2;
  blockDim.x = threads;
  for (long steps = 0; !order.empty() || !live.empty(); ++steps) {
    while (!order.empty() && static_cast<int>(live.size()) < at_once) {
      live.emplace_back();
      Block& block = live.back();
      block.number = order.back();
      order.pop_back();
      block.live = block.barrier.members = threads;
      block.memory.assign(memory / 8 + 1, NAN);
      block.warps.resize((threads + 31) / 32);
      block.exchanged.resize(threads);
      for (unsigned thread = 0; thread < threads; ++thread) {
        ++block.warps[thread / 32].members;
        if (idle.empty()) {
          fibers.emplace_back();
          fibers.back().stack.resize(64 << 10);
          idle.push_back(&fibers.back());
        }
        idle.back()->block = &block;
        idle.back()->thread = thread;
        idle.back()->started = false;
        ready.push_back(idle.back());
        idle.pop_back();
      }
    }
    if (ready.empty()) return kLaunchFailed;
    if (steps > 20000000) return kTimeout;
    if (!by_warps || lot() % 1024 == 0) std::swap(ready[lot() % ready.size()], ready.back());
    Fiber* const drawn = ready.back();
    ready.pop_back();
    go_on(drawn);
    if (drawn->block) continue;
    idle.push_back(drawn);
    live.remove_if([](const Block& block) { return !block.live; });
  }
  return 0;
}

int blocks_at_once(unsigned threads, size_t memory) {
  return std::min<int>(2048 / threads, multiprocessor_memory / (memory + 1024));
}

struct Function { std::string name; void* address; };

}  // namespace

unsigned char* block_memory() { return reinterpret_cast<unsigned char*>(current->block->memory.data()); }
void wait_for_block() { wait(&current->block->barrier); }
void wait_for_warp() { wait(&current->block->warps[current->thread / 32]); }
void let_others_run() {
  ready.push_back(current);
  std::swap(ready[lot() % ready.size()], ready.back());
  stop();
}

float exchange(float value, int offset) {
  float* exchanged = current->block->exchanged.data();
  exchanged[current->thread] = value;
  wait_for_warp();
  const float other = exchanged[current->thread ^ offset];
  wait_for_warp();
  return other;
}

extern "C" {

// For the tests: another GPU, with an order of its own; blocks to leave out; what was launched since the last question.
void gpu_is(int count, int memory, int capability_, int seed) {
  multiprocessors = count;
  multiprocessor_memory = memory;
  capability = capability_;
  lot.seed(seed);
  first_block = 0;
  ++gpus;
}
void gpu_starts_at(unsigned block) { first_block = block; }
const char* gpu_launches() { static std::string told; told.swap(launches); launches.clear(); return told.c_str(); }

int cuGetErrorString(int result, const char** text) {
  *text = result == kLaunchFailed ? "all threads wait" : result == kTimeout ? "endless waiting" : "unknown";
  return 0;
}
int cuCtxGetCurrent(void** context) { *context = &scheduler + gpus; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = multiprocessors; return 0;
    case 75: *value = capability / 10; return 0;
    case 76: *value = capability % 10; return 0;
    case 81: *value = multiprocessor_memory; return 0;
    case 97: *value = multiprocessor_memory - 1024; return 0;
    case 111: *value = 1024; return 0;
  }
  return 1;
}
#ifdef REAL_NVRTC
int cuModuleLoadData(void** module, const void* image) {
  const char* text = static_cast<const char*>(image);
  const bool is_ptx = !std::strncmp(text, "//", 2);
  launches += is_ptx ? "ptx\n" : "cubin\n";
  *module = const_cast<void*>(image);
  return is_ptx || !std::memcmp(image, "\177ELF", 4) ? 0 : 200;
}
int cuModuleGetFunction(void** function, void*, const char* name) { *function = new Function{name, nullptr}; return 0; }
#else
int cuModuleLoadData(void** module, const void* image) {
  return (*module = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL)) ? 0 : 209;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  void* address = dlsym(module, name);
  *function = new Function{name, address};
  return address ? 0 : 500;
}
#endif
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t memory) {
  *blocks = blocks_at_once(threads, memory);
  return 0;
}
int cuMemsetD32Async(unsigned long long to, unsigned value, size_t count, void*) {
#ifndef REAL_NVRTC  // where no array is there
  std::fill_n(reinterpret_cast<unsigned*>(to), count, value);
#endif
  return 0;
}
int cuLaunchKernel(void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned memory, void*, void** arguments, void**) {
  const Function& what = *static_cast<Function*>(function);
  const Split split = *static_cast<Split*>(arguments[0]);
  launches += what.name + " blocks=" + std::to_string(blocks) + " threads=" + std::to_string(threads) +
              " team=" + std::to_string(split.team) + " chunks=" + std::to_string(split.chunks) +
              " stage=" + std::to_string(split.stage) + "\n";
  if (!what.address) return 0;
  const auto with = [&](auto arrays) -> std::function<void()> {
    using Kernel = void (*)(Split, decltype(arrays));
    return [=] { reinterpret_cast<Kernel>(what.address)(split, arrays); };
  };
  const std::function<void()> work = what.name[0] == 'f' ? with(*static_cast<ForwardArrays*>(arguments[1]))
      : what.name[0] == 'b' ? with(*static_cast<BackwardArrays*>(arguments[1]))
                            : with(*static_cast<ParameterGradients*>(arguments[1]));
  kernel = &work;
  const int fit = blocks_at_once(threads, memory) * multiprocessors;
  return fit ? run(blocks, threads, memory, fit) : 701;
}

#ifndef REAL_NVRTC
// NVRTC, whose machine code is the path of a library beside this one.
const char* nvrtcGetErrorString(int) { return "unknown"; }
int nvrtcGetNumSupportedArchs(int* count) { *count = 1; return 0; }
int nvrtcGetSupportedArchs(int* known) { *known = 86; return 0; }
int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&nvrtcCreateProgram), &here);
  *program = new std::string(here.dli_fname);
  return 0;
}
int nvrtcCompileProgram(void* program, int count, const char* const* options) {
  std::string& path = *static_cast<std::string*>(program);
  path.resize(path.rfind('/') + 1);
  for (int i = 0; i < count; ++i)
    if (!std::strncmp(options[i], "-DSTORED=", 9)) path += options[i] + 9;
  path += ".so";
  return 0;
}
int nvrtcGetProgramLogSize(void*, size_t* size) { *size = 1; return 0; }
int nvrtcGetProgramLog(void*, char* text) { *text = 0; return 0; }
int nvrtcGetPTXSize(void*, size_t*) { return 1; }
int nvrtcGetPTX(void*, char*) { return 1; }
int nvrtcGetCUBINSize(void* program, size_t* size) {
  *size = static_cast<std::string*>(program)->size() + 1;
  return 0;
}
int nvrtcGetCUBIN(void* program, char* code) {
  std::strcpy(code, static_cast<std::string*>(program)->c_str());
  return 0;
}
int nvrtcDestroyProgram(void** program) { delete static_cast<std::string*>(*program); return 0; }
#endif

}  // extern "C"

#endif
