// libpuna_cuda.so: the functions of DeviceTable over the CUDA runtime, which is linked in; the
// driver is found at run time, so the library loads where there is none.
#include "kernels/cuda/launches.h"

namespace puna::cuda {
namespace {

struct Device {
  int ordinal;
  cudaStream_t stream;  // kMainQueue
  // Where kernels of graphs are noted. In a stream of somebody else's, whatever its owner asks it
  // for meanwhile, from another thread, would become part of the graph.
  cudaStream_t captures;
  bool capturing;
  cudaStream_t sends;   // kSendQueue
  cudaEvent_t fetched;  // the last fetch()
  bool overlaps;        // kernels may wait for one another
  bool warpgroups;      // there are products of warpgroups
};

// What the kernels that the current device runs were compiled with shows in its attributes.
constexpr int kPlainThreads = kWarp, kWarpgroupThreads = kWarpgroup;
__global__ void __launch_bounds__(PUNA_WARPGROUPS ? kWarpgroupThreads : kPlainThreads)
    architecture_kernel() {}

// Whether they were compiled with after_earlier_kernels(), and with products of warpgroups.
cudaError_t architecture(bool* wait, bool* warpgroups) {
  cudaFuncAttributes of = {};
  const cudaError_t error = cudaFuncGetAttributes(&of, architecture_kernel);
  *wait = of.ptxVersion >= 90;
  *warpgroups = of.maxThreadsPerBlock == kWarpgroupThreads;
  return error;
}

int code(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // so that the next call does not report it again
  return static_cast<int>(error);
}

Device& device_of(void* device) { return *static_cast<Device*>(device); }

// Work of a Device, on whatever thread it is called.
template <class Work>
int on(void* device, const Work& work) {
  const Device& of = device_of(device);
  if (const cudaError_t error = cudaSetDevice(of.ordinal)) return code(error);
  launches_overlap = of.overlaps;
  has_warpgroups = of.warpgroups;
  return code(work(of.capturing ? of.captures : of.stream));
}

int device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) *count = 0;
  return code(error);
}

int device_info(int ordinal, DeviceInfo* info) {
  cudaDeviceProp found;
  if (const cudaError_t error = cudaGetDeviceProperties(&found, ordinal)) return code(error);
  size_t i = 0;
  for (; found.name[i] != '\0' && i + 1 < sizeof(info->name); ++i) info->name[i] = found.name[i];
  info->name[i] = '\0';
  info->major = found.major;
  info->minor = found.minor;
  info->multiprocessors = found.multiProcessorCount;
  info->memory = static_cast<int64_t>(found.totalGlobalMem);
  return 0;
}

int free_memory(int ordinal, int64_t* bytes) {
  if (const cudaError_t error = cudaSetDevice(ordinal)) return code(error);
  size_t free = 0, total = 0;
  const cudaError_t error = cudaMemGetInfo(&free, &total);
  *bytes = static_cast<int64_t>(free);
  return code(error);
}

const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int stream_device(void* stream, int* ordinal) {
  return code(cudaStreamGetDevice(static_cast<cudaStream_t>(stream), ordinal));
}

// What a stream is asked for while it is captured would become part of somebody else's graph.
cudaError_t require_free(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, &status)) return error;
  return status == cudaStreamCaptureStatusNone ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

int open(int ordinal, void* given, void** device) {
  if (const cudaError_t error = cudaSetDevice(ordinal)) return code(error);
  // Released memory stays with the process, for the next allocation.
  cudaMemPool_t pool;
  if (const cudaError_t error = cudaDeviceGetDefaultMemPool(&pool, ordinal)) return code(error);
  uint64_t all = UINT64_MAX;
  if (const cudaError_t error =
          cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all))
    return code(error);
  bool overlaps = false, warpgroups = false;
  if (const cudaError_t error = architecture(&overlaps, &warpgroups)) return code(error);
  auto stream = static_cast<cudaStream_t>(given);
  cudaStream_t captures, sends;
  int priority = 0;  // also of the kernels of graphs
  if (given != nullptr) {
    if (const cudaError_t error = require_free(stream)) return code(error);
    if (const cudaError_t error = cudaStreamGetPriority(stream, &priority)) return code(error);
  }
  if (const cudaError_t error =
          cudaStreamCreateWithPriority(&captures, cudaStreamNonBlocking, priority))
    return code(error);
  if (given == nullptr) stream = captures;
  if (const cudaError_t error = cudaStreamCreateWithFlags(&sends, cudaStreamNonBlocking))
    return code(error);
  cudaEvent_t fetched;
  if (const cudaError_t error = cudaEventCreateWithFlags(&fetched, cudaEventDisableTiming))
    return code(error);
  *device = new Device{ordinal, stream, captures, false, sends, fetched, overlaps, warpgroups};
  return 0;
}

cudaError_t wait_for_all(void* device, cudaStream_t stream) {
  if (const cudaError_t error = cudaStreamSynchronize(device_of(device).sends)) return error;
  return cudaStreamSynchronize(stream);
}

void close(void* device) {
  on(device, [&](cudaStream_t stream) {
    const cudaError_t error = wait_for_all(device, stream);
    cudaEventDestroy(device_of(device).fetched);
    cudaStreamDestroy(device_of(device).sends);
    cudaStreamDestroy(device_of(device).captures);
    return error;
  });
  delete &device_of(device);
}

int synchronise(void* device) {
  return on(device, [&](cudaStream_t stream) { return wait_for_all(device, stream); });
}

int await_everybody(void* device) {
  return on(device, [](cudaStream_t) {
    // Otherwise it would end what another thread is capturing.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (const cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode)) return error;
    const cudaError_t error = cudaDeviceSynchronize();
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
  });
}

int allocate(void* device, size_t bytes, void** memory) {
  return on(device, [&](cudaStream_t stream) {
    if (const cudaError_t error = cudaMallocAsync(memory, bytes, stream)) return error;
    return cudaMemsetAsync(*memory, 0, bytes, stream);
  });
}

int release(void* device, void* memory) {
  return on(device, [&](cudaStream_t stream) { return cudaFreeAsync(memory, stream); });
}

// Pageable memory has been read when the call returns.
int upload(void* device, void* to, const void* from, size_t bytes) {
  return on(device, [&](cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
  });
}

cudaError_t copy_rows(void* to, const void* from, size_t bytes, size_t stride, int64_t rows,
                      cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, stride, bytes, static_cast<size_t>(rows),
                           cudaMemcpyDeviceToHost, stream);
}

int download(void* device, void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
  if (bytes == 0 || rows == 0) return 0;
  return on(device, [&](cudaStream_t stream) {
    if (const cudaError_t error = copy_rows(to, from, bytes, stride, rows, stream)) return error;
    return cudaStreamSynchronize(stream);
  });
}

int allocate_host(void* device, size_t bytes, void** memory) {
  return on(device, [&](cudaStream_t) { return cudaMallocHost(memory, bytes); });
}

// What is on its way from it or to it ends first.
int release_host(void* device, void* memory) {
  return on(device, [&](cudaStream_t stream) {
    if (const cudaError_t error = wait_for_all(device, stream)) return error;
    return cudaFreeHost(memory);
  });
}

int fetch(void* device, void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
  return on(device, [&](cudaStream_t stream) {
    if (const cudaError_t error = copy_rows(to, from, bytes, stride, rows, stream)) return error;
    return cudaEventRecord(device_of(device).fetched, stream);
  });
}

int await_fetched(void* device) {
  return on(device, [&](cudaStream_t) { return cudaEventSynchronize(device_of(device).fetched); });
}

int send(void* device, void* to, const void* from, size_t bytes) {
  return on(device, [&](cudaStream_t) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, device_of(device).sends);
  });
}

cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

int make_event(void* device, int32_t timed, void** event) {
  return on(device, [&](cudaStream_t) {
    cudaEvent_t made = nullptr;
    const cudaError_t error =
        cudaEventCreateWithFlags(&made, timed != 0 ? cudaEventDefault : cudaEventDisableTiming);
    *event = made;
    return error;
  });
}

int release_event(void* device, void* event) {
  return on(device, [&](cudaStream_t) { return cudaEventDestroy(event_of(event)); });
}

cudaStream_t stream_of(void* device, int32_t queue) {
  return queue == kSendQueue ? device_of(device).sends : device_of(device).stream;
}

int record_event(void* device, void* event, int32_t queue) {
  return on(device, [&](cudaStream_t) {
    return cudaEventRecord(event_of(event), stream_of(device, queue));
  });
}

int wait_for_event(void* device, void* event, int32_t queue) {
  return on(device, [&](cudaStream_t) {
    return cudaStreamWaitEvent(stream_of(device, queue), event_of(event), 0);
  });
}

int await_event(void* device, void* event) {
  return on(device, [&](cudaStream_t) { return cudaEventSynchronize(event_of(event)); });
}

int elapsed(void* device, void* from, void* to, float* milliseconds) {
  return on(device, [&](cudaStream_t) {
    return cudaEventElapsedTime(milliseconds, event_of(from), event_of(to));
  });
}

int copy(void* device, void* to, const void* from, size_t bytes) {
  return on(device, [&](cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
  });
}

int begin_graph(void* device) {
  device_of(device).capturing = true;
  const int error = on(device, [](cudaStream_t stream) {
    return cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  });
  device_of(device).capturing = error == 0;
  return error;
}

int end_graph(void* device, void** graph) {
  const int error = on(device, [&](cudaStream_t stream) {
    cudaGraph_t noted = nullptr;
    cudaError_t error = cudaStreamEndCapture(stream, &noted);
    if (error != cudaSuccess) return error;
    cudaGraphExec_t made = nullptr;
    error = cudaGraphInstantiate(&made, noted, 0);
    cudaGraphDestroy(noted);
    *graph = made;
    return error;
  });
  device_of(device).capturing = false;
  return error;
}

int start_graph(void* device, void* graph) {
  return on(device, [&](cudaStream_t stream) {
    return cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream);
  });
}

// One that is under way ends first.
int release_graph(void* device, void* graph) {
  return on(device, [&](cudaStream_t) {
    return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
  });
}

template <auto kLaunch, class Call>
int run(void* device, const Call* call) {
  return on(device,
            [&](cudaStream_t stream) { return static_cast<cudaError_t>(kLaunch(*call, stream)); });
}

constexpr DeviceTable kTable = {
    kTableVersion,  &device_count, &device_info, &free_memory,     &describe,     &stream_device,
    &open,          &close,        &synchronise, &await_everybody, &allocate,     &release,
    &upload,        &download,     &copy,        &allocate_host,   &release_host, &fetch,
    &await_fetched, &send,         &make_event,  &release_event,   &record_event, &wait_for_event,
    &await_event,   &elapsed,      &begin_graph, &end_graph,       &start_graph,  &release_graph,
#define PUNA_OPERATION(name, Call) &run<launch_##name, Call>,
#include "kernels/cuda/operations.inc"
#undef PUNA_OPERATION
};

}  // namespace
}  // namespace puna::cuda

extern "C" __attribute__((visibility("default"))) const puna::cuda::DeviceTable* PUNA_CUDA_ENTRY(
    int32_t version) {
  return version == puna::cuda::kTableVersion ? &puna::cuda::kTable : nullptr;
}
