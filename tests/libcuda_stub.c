/* A stand-in for libcuda.so.1 on machines without an NVIDIA driver.
   As it is: the ten functions that libmxnet.so of the cu112 wheel links to, so that it loads; there is no GPU.
   With -DMAJOR=9 -DMINOR=0: a driver that answers for one GPU of that compute capability.
   gcc -shared -fPIC -o libcuda.so.1 libcuda_stub.c */
#define NOT_INITIALIZED 3

int cuDevicePrimaryCtxRetain(void) { return NOT_INITIALIZED; }
int cuGetErrorString(void) { return NOT_INITIALIZED; }
int cuGraphKernelNodeGetParams(void) { return NOT_INITIALIZED; }
int cuGraphNodeGetType(void) { return NOT_INITIALIZED; }
int cuLaunchKernel(void) { return NOT_INITIALIZED; }
int cuModuleGetFunction(void) { return NOT_INITIALIZED; }
int cuModuleLoadData(void) { return NOT_INITIALIZED; }
int cuModuleLoadDataEx(void) { return NOT_INITIALIZED; }
int cuModuleUnload(void) { return NOT_INITIALIZED; }

#ifndef MAJOR
int cuDeviceGet(void) { return NOT_INITIALIZED; }
#else
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? MAJOR : attribute == 76 ? MINOR : 0;
    return 0;
}
#endif
