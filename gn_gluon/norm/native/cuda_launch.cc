// Compiles cuda_kernels.cu for the GPU at hand, once for each type, and decides how its threads share the work.
#include "cuda_launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_kernels.cu"  // the arguments of its kernels

// The source itself; the assembler finds it in its own search path (-Wa,-I).
asm(".pushsection .rodata\n"
    "gn_gluon_cuda_source:\n"
    ".incbin \"cuda_kernels.cu\"\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const char gn_gluon_cuda_source[];

namespace gn_gluon {
namespace {

// ------------------------------------------------------------------------------------------- CUDA without its headers

// From cuda.h: handles are pointers, CUdeviceptr is an unsigned long long, results are 0 or an error's number.
enum Attribute {
  kMultiprocessors = 16,
  kMajor = 75,
  kMinor = 76,
  kMemoryOfMultiprocessor = 81,
  kMemoryOfBlock = 97,
  kReservedOfBlock = 111,
};
enum FunctionAttribute { kMaxDynamicMemory = 8, kPreferredMemoryShare = 9 };

struct Driver {
  int (*cuGetErrorString)(int, const char**);
  int (*cuCtxGetCurrent)(void**);
  int (*cuCtxGetDevice)(int*);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuModuleLoadData)(void**, const void*);
  int (*cuModuleGetFunction)(void**, void*, const char*);
  int (*cuFuncSetAttribute)(void*, int, int);
  int (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int*, void*, int, size_t);
  int (*cuMemsetD32Async)(unsigned long long, unsigned, size_t, void*);
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                        void**);
};

struct Compiler {  // NVRTC from 11.2 on
  const char* (*nvrtcGetErrorString)(int);
  int (*nvrtcGetNumSupportedArchs)(int*);
  int (*nvrtcGetSupportedArchs)(int*);
  int (*nvrtcCreateProgram)(void**, const char*, const char*, int, const char* const*, const char* const*);
  int (*nvrtcCompileProgram)(void*, int, const char* const*);
  int (*nvrtcGetProgramLogSize)(void*, size_t*);
  int (*nvrtcGetProgramLog)(void*, char*);
  int (*nvrtcGetPTXSize)(void*, size_t*);
  int (*nvrtcGetPTX)(void*, char*);
  int (*nvrtcGetCUBINSize)(void*, size_t*);
  int (*nvrtcGetCUBIN)(void*, char*);
  int (*nvrtcDestroyProgram)(void**);
};

[[noreturn]] void fail(const std::string& sentence) { throw std::runtime_error(sentence); }

// A library whose names are visible in the process, or that it has loaded under that name (MXNet its driver,
// gn_gluon.compat NVRTC from pip), or that the system has.
class Library {
 public:
  Library(const char* probe, std::vector<const char*> files, const char* advice) {
    if (dlsym(RTLD_DEFAULT, probe)) {
      handle_ = RTLD_DEFAULT;
      return;
    }
    for (const char* file : files)
      if ((handle_ = dlopen(file, RTLD_NOW))) return;
    fail(std::string(files[0]) + " is missing, which GroupNorm on a GPU needs; " + advice);
  }

  template <typename Function>
  void find(Function** function, const char* name) const {
    *function = reinterpret_cast<Function*>(dlsym(handle_, name));
    if (!*function)
      fail(std::string("this CUDA lacks ") + name + ", which GroupNorm on a GPU needs; install a newer one");
  }

 private:
  void* handle_ = nullptr;
};

#define FIND(name) library.find(&found.name, #name)

const Driver& driver() {
  static const Driver driver = [] {
    const Library library("cuLaunchKernel", {"libcuda.so.1"}, "install NVIDIA's driver");
    Driver found;
    FIND(cuGetErrorString);
    FIND(cuCtxGetCurrent);
    FIND(cuCtxGetDevice);
    FIND(cuDeviceGetAttribute);
    FIND(cuModuleLoadData);
    FIND(cuModuleGetFunction);
    FIND(cuFuncSetAttribute);
    FIND(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    FIND(cuMemsetD32Async);
    FIND(cuLaunchKernel);
    return found;
  }();
  return driver;
}

const Compiler& compiler() {
  static const Compiler compiler = [] {
    const Library library("nvrtcCompileProgram",
                          {"libnvrtc.so.11.2", "libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"},
                          "install it with: pip install nvidia-cuda-nvrtc-cu11");
    Compiler found;
    FIND(nvrtcGetErrorString);
    FIND(nvrtcGetNumSupportedArchs);
    FIND(nvrtcGetSupportedArchs);
    FIND(nvrtcCreateProgram);
    FIND(nvrtcCompileProgram);
    FIND(nvrtcGetProgramLogSize);
    FIND(nvrtcGetProgramLog);
    FIND(nvrtcGetPTXSize);
    FIND(nvrtcGetPTX);
    FIND(nvrtcGetCUBINSize);
    FIND(nvrtcGetCUBIN);
    FIND(nvrtcDestroyProgram);
    return found;
  }();
  return compiler;
}

#undef FIND

void check(int result, const char* doing) {
  if (!result) return;
  const char* text = nullptr;
  driver().cuGetErrorString(result, &text);
  fail(std::string("GroupNorm on the GPU: ") + doing + " failed: " + (text ? text : "error " + std::to_string(result)));
}

void check_compiler(int result, const char* doing) {
  if (result)
    fail(std::string("GroupNorm on the GPU: ") + doing + " failed: " + compiler().nvrtcGetErrorString(result));
}

// ------------------------------------------------------------------------------------------- compilation

// Machine code for a compute capability such as 86; for one that is newer than this NVRTC, PTX, which the driver takes.
std::string compile(const char* stored, int capability) {
  const Compiler& nvrtc = compiler();
  int count = 0;
  check_compiler(nvrtc.nvrtcGetNumSupportedArchs(&count), "asking NVRTC what it compiles for");
  std::vector<int> known(count);
  check_compiler(nvrtc.nvrtcGetSupportedArchs(known.data()), "asking NVRTC what it compiles for");
  int target = 0;
  for (int one : known)
    if (one <= capability) target = std::max(target, one);
  const std::string name = "sm_" + std::to_string(capability);
  if (capability < 50 || !target)
    fail("the GPU is an " + name + ", but GroupNorm on a GPU needs sm_50 or newer and an NVRTC that knows it");
  const bool native = target == capability;

  void* program = nullptr;
  check_compiler(nvrtc.nvrtcCreateProgram(&program, gn_gluon_cuda_source, "cuda_kernels.cu", 0, nullptr, nullptr),
                 "starting NVRTC");
  const std::string architecture = std::string("--gpu-architecture=") + (native ? "sm_" : "compute_") +
                                   std::to_string(target),
                    definition = std::string("-DSTORED=") + stored;
  const char* const options[] = {architecture.c_str(), definition.c_str(), "--std=c++14"};
  const int result = nvrtc.nvrtcCompileProgram(program, 3, options);
  std::string code;
  size_t size = 0;
  if (result) {
    nvrtc.nvrtcGetProgramLogSize(program, &size);
    code.resize(size);
    nvrtc.nvrtcGetProgramLog(program, &code[0]);
  } else {
    (native ? nvrtc.nvrtcGetCUBINSize : nvrtc.nvrtcGetPTXSize)(program, &size);
    code.resize(size);
    (native ? nvrtc.nvrtcGetCUBIN : nvrtc.nvrtcGetPTX)(program, &code[0]);
  }
  nvrtc.nvrtcDestroyProgram(&program);
  if (result) fail("cuda_kernels.cu does not compile for " + name + ":\n" + code.c_str());
  return code;
}

struct Device {
  int multiprocessors, memory_of_multiprocessor, memory_of_block, reserved_of_block;
};

struct Kernels {
  Device device;
  void *forward[3], *backward[3];  // whole, crossing, single
  void* reduce;
};

int attribute(Attribute which, int device) {
  int value = 0;
  check(driver().cuDeviceGetAttribute(&value, which, device), "asking for the GPU's properties");
  return value;
}

Kernels load(Type type) {
  static const char* const stored[] = {"Float32", "BFloat16", "Float16"};  // in the order of Type
  int number;
  check(driver().cuCtxGetDevice(&number), "asking for the current GPU");
  Kernels kernels;
  kernels.device = Device{attribute(kMultiprocessors, number), attribute(kMemoryOfMultiprocessor, number),
                          attribute(kMemoryOfBlock, number), attribute(kReservedOfBlock, number)};
  const std::string code = compile(stored[static_cast<int>(type)],
                                   attribute(kMajor, number) * 10 + attribute(kMinor, number));
  void* module;
  check(driver().cuModuleLoadData(&module, code.data()), "loading its kernels");
  const std::pair<const char*, void**> functions[] = {
      {"forward_whole", &kernels.forward[0]},   {"backward_whole", &kernels.backward[0]},
      {"forward_crossing", &kernels.forward[1]}, {"backward_crossing", &kernels.backward[1]},
      {"forward_single", &kernels.forward[2]},  {"backward_single", &kernels.backward[2]},
      {"reduce_parameters", &kernels.reduce},
  };
  for (const auto& function : functions) {
    check(driver().cuModuleGetFunction(function.second, module, function.first), "finding its kernels");
    check(driver().cuFuncSetAttribute(*function.second, kMaxDynamicMemory, kernels.device.memory_of_block),
          "asking for shared memory");
    check(driver().cuFuncSetAttribute(*function.second, kPreferredMemoryShare, 100), "asking for shared memory");
  }
  return kernels;
}

// The kernels for the current context; compiled when first asked for, and kept as long as the process lives.
const Kernels& kernels_for(Type type) {
  static std::mutex mutex;
  static std::map<std::pair<void*, Type>, Kernels> loaded;
  void* context = nullptr;
  check(driver().cuCtxGetCurrent(&context), "asking for the CUDA context");
  if (!context) fail("GroupNorm on the GPU needs a current CUDA context");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(context, type);
  const auto found = loaded.find(key);
  return found != loaded.end() ? found->second : loaded.emplace(key, load(type)).first->second;
}

// ------------------------------------------------------------------------------------------- sharing the work

int block_memory = 0;  // of cuda_set_block_memory

struct Plan {
  Split split;
  void* kernel;
  unsigned blocks, threads;
  size_t memory;                                 // shared, of a block
  bool two_launches;
  int64_t chunk_sums, segment_sums, tickets;     // bytes of the workspace
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

bool is_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

Plan make_plan(const Shape& shape, Type type, bool aligned, bool backward, bool parameters) {
  const Kernels& kernels = kernels_for(type);
  const Device& device = kernels.device;
  const int bytes = type == Type::float32 ? 4 : 2, arrays = backward ? 2 : 1;
  const int64_t group_size = shape.channels / shape.groups * shape.pixels, groups = shape.samples * shape.groups;
  if (std::max({shape.samples, shape.channels, shape.pixels}) > INT_MAX)
    fail("GroupNorm on a GPU takes at most 2^31 - 1 samples, channels and pixels");
  const int variant = !aligned || group_size * bytes % 16 || shape.pixels * bytes < 16 ? 2
                      : shape.pixels * bytes % 16 ? 1 : 0;
  const int width = variant == 2 ? 1 : 16 / bytes;

  Plan plan = {};
  Split& split = plan.split;
  plan.kernel = (backward ? kernels.backward : kernels.forward)[variant];
  split.group_size = group_size;
  split.samples = static_cast<int>(shape.samples);
  split.channels = static_cast<int>(shape.channels);
  split.groups = static_cast<int>(shape.groups);
  split.pixels = static_cast<int>(shape.pixels);

  // Two blocks at once on a multiprocessor: one computes while the other loads.
  const int most = device.memory_of_multiprocessor / 2 - device.reserved_of_block;
  const int64_t memory = std::min(block_memory ? block_memory : most, device.memory_of_block);
  // A segment's sums take 8 bytes, and there may be one segment and one warp's sums more than the pixels say.
  const int64_t for_sums = backward ? 8 * (2 + kMaxTeam / 32) : 0;
  const double bytes_of_value = arrays * bytes + (backward ? 8. / shape.pixels : 0);
  const int64_t line = 128 / bytes;
  const int64_t capacity = static_cast<int64_t>((memory - kScratch - for_sums) / bytes_of_value) / line * line;
  // Few groups are cut further, for all multiprocessors to have work, as long as a chunk is worth a block.
  const int64_t worth = std::max<int64_t>(1, group_size * arrays * bytes / 16384);
  const int64_t wanted = std::min(worth, divide_up(2 * device.multiprocessors, groups));
  const int64_t chunks = std::max(wanted, divide_up(group_size, capacity));
  split.chunk = static_cast<int>(chunks == 1 ? group_size : round_up(divide_up(group_size, chunks), line));
  const int64_t number_of_chunks = divide_up(group_size, split.chunk);
  split.all_chunks = groups * number_of_chunks;
  if (number_of_chunks > INT_MAX || split.all_chunks > INT_MAX)
    fail("GroupNorm on a GPU takes at most 2^31 - 1 groups of all samples, or parts of them");
  split.chunks = static_cast<int>(number_of_chunks);
  const int64_t group_channels = shape.channels / shape.groups;
  split.segments = static_cast<int>(split.chunks == 1 ? group_channels
                                    : std::min(group_channels, (split.chunk - 1) / shape.pixels + 2));

  // As many threads as the registers of a multiprocessor suffice for (64 each) when its shared memory is full. Teams
  // that wait are blocks.
  split.team = split.chunks == 1 ? 32 : 64;
  const int64_t bytes_of_thread = device.memory_of_multiprocessor / 1024;
  while (split.team < kMaxTeam && split.team * bytes_of_thread < split.chunk * bytes * arrays) split.team *= 2;
  // All threads for the segments; at least 8 for each, while there is work for them: neighbours read other banks.
  const int64_t units = variant == 0 ? shape.pixels / width : shape.pixels;
  const int share = split.team / split.segments;
  split.lanes = split.parts = 1;
  while (split.lanes < 32 && split.lanes < units && (split.lanes < 8 || split.lanes * 2 <= share)) split.lanes *= 2;
  while (split.lanes == 32 && split.parts * 64 <= share) split.parts *= 2;
  split.team_bytes = static_cast<int>(arrays * round_up(split.chunk * bytes, 16));
  if (backward) split.team_bytes += static_cast<int>(round_up(8 * split.segments * split.parts, 16));
  const int64_t teams = split.team > 32 ? 1
      : std::max<int64_t>(1, std::min<int64_t>(4, (memory - kScratch) / split.team_bytes));
  plan.threads = static_cast<unsigned>(teams * split.team);
  plan.blocks = static_cast<unsigned>(divide_up(split.all_chunks, teams));
  plan.memory = kScratch + teams * split.team_bytes;

  if (split.chunks > 1) {
    int at_once = 0;
    check(driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, plan.kernel, plan.threads, plan.memory),
          "asking how many blocks run at once");
    // Blocks that wait for each other must all run at once, beside those of other streams that may wait as well: those
    // of a group take a quarter of the GPU at most.
    plan.two_launches = split.chunks > static_cast<int64_t>(at_once) * device.multiprocessors / 4;
    plan.chunk_sums = round_up(split.all_chunks * 3 * 4, 16);
    plan.tickets = plan.two_launches ? 0 : (1 + groups) * 4;
  }
  if (parameters) plan.segment_sums = round_up(split.all_chunks * split.segments * 8, 16);
  return plan;
}

int64_t workspace_of(const Plan& plan) {
  const int64_t bytes = plan.chunk_sums + plan.segment_sums + plan.tickets;
  if (bytes > INT_MAX) fail("GroupNorm on a GPU would need more than 2 GB of workspace");
  return bytes;
}

void launch(void* kernel, unsigned blocks, unsigned threads, size_t memory, Split* split, void* arrays, void* stream) {
  void* arguments[] = {split, arrays};
  check(driver().cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, static_cast<unsigned>(memory), stream, arguments,
                                nullptr),
        "launching a kernel");
}

void launch(Plan& plan, void* arrays, void* workspace, void* stream) {
  Split& split = plan.split;
  char* next = static_cast<char*>(workspace);
  if (plan.chunk_sums) split.chunk_sums = reinterpret_cast<float*>(next);
  if (plan.segment_sums) split.segment_sums = reinterpret_cast<float*>(next + plan.chunk_sums);
  if (plan.tickets) {
    split.tickets = reinterpret_cast<unsigned*>(next + plan.chunk_sums + plan.segment_sums);
    check(driver().cuMemsetD32Async(reinterpret_cast<uintptr_t>(split.tickets), 0, plan.tickets / 4, stream),
          "clearing memory");
  }
  split.stage = plan.two_launches ? kSums : kWhole;
  launch(plan.kernel, plan.blocks, plan.threads, plan.memory, &split, arrays, stream);
  if (!plan.two_launches) return;
  split.stage = kRest;
  launch(plan.kernel, plan.blocks, plan.threads, plan.memory, &split, arrays, stream);
}

bool is_empty(const Shape& shape) { return shape.samples * shape.channels * shape.pixels == 0; }

Plan plan_of(const Shape& shape, const Forward& a) {
  return make_plan(shape, a.type, is_aligned({a.x, a.residual, a.y}), false, false);
}

Plan plan_of(const Shape& shape, const Backward& a) {
  const void* y = a.relu && a.residual ? a.y : nullptr;
  return make_plan(shape, a.type, is_aligned({a.dy, a.x, y, a.dx, a.dresidual}), true, a.dgamma || a.dbeta);
}

}  // namespace

void cuda_set_block_memory(int bytes) { block_memory = bytes; }

int64_t cuda_workspace(const Shape& shape, const Forward& arguments) {
  return is_empty(shape) ? 0 : workspace_of(plan_of(shape, arguments));
}

int64_t cuda_workspace(const Shape& shape, const Backward& arguments) {
  return is_empty(shape) ? 0 : workspace_of(plan_of(shape, arguments));
}

void cuda_forward(const Shape& shape, const Forward& a, void* workspace, void* stream) {
  if (a.period != 1) fail("GroupNorm on a GPU takes the plain layout only");
  if (is_empty(shape)) return;
  ForwardArrays arrays = {a.x, a.residual, a.gamma, a.beta, a.y, a.mean, a.rstd, shape.epsilon, a.relu};
  Plan plan = plan_of(shape, a);
  launch(plan, &arrays, workspace, stream);
}

void cuda_backward(const Shape& shape, const Backward& a, void* workspace, void* stream) {
  if (a.period != 1) fail("GroupNorm on a GPU takes the plain layout only");
  if (a.add_dx || a.add_dresidual || a.add_dgamma || a.add_dbeta)
    fail("GroupNorm on a GPU overwrites gradients and cannot add to them");
  if (is_empty(shape)) {
    for (float* out : {a.dgamma, a.dbeta})
      if (out) check(driver().cuMemsetD32Async(reinterpret_cast<uintptr_t>(out), 0, shape.channels, stream),
                     "clearing memory");
    return;
  }
  BackwardArrays arrays = {a.dy, a.x, a.y, a.gamma, a.beta, a.mean, a.rstd, a.dx, a.dresidual, a.relu, a.residual};
  Plan plan = plan_of(shape, a);
  launch(plan, &arrays, workspace, stream);
  if (!plan.segment_sums) return;
  ParameterGradients gradients = {a.dgamma, a.dbeta};
  launch(kernels_for(a.type).reduce, static_cast<unsigned>(divide_up(shape.channels, 32)), kReduceThreads,
         2 * 32 * 33 * sizeof(float), &plan.split, &gradients, stream);
}

}  // namespace gn_gluon
