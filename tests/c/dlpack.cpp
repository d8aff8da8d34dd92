// idxc_tensor is DLTensor: same places, same numbers. -DDLPACK_H names the dlpack.h of an installed package.
#include DLPACK_H
#include <indexcache/indexcache.h>

#include <cstddef>

#define SAME(ours, theirs, field)                                                                      \
  static_assert(offsetof(ours, field) == offsetof(theirs, field), #ours "." #field " is elsewhere");   \
  static_assert(sizeof(static_cast<ours *>(nullptr)->field) == sizeof(static_cast<theirs *>(nullptr)->field), \
                #ours "." #field " has another size")

SAME(idxc_tensor, DLTensor, data);
SAME(idxc_tensor, DLTensor, device);
SAME(idxc_tensor, DLTensor, ndim);
SAME(idxc_tensor, DLTensor, dtype);
SAME(idxc_tensor, DLTensor, shape);
SAME(idxc_tensor, DLTensor, strides);
SAME(idxc_tensor, DLTensor, byte_offset);
static_assert(sizeof(idxc_tensor) == sizeof(DLTensor) && alignof(idxc_tensor) == alignof(DLTensor), "idxc_tensor");
SAME(idxc_device, DLDevice, device_type);
SAME(idxc_device, DLDevice, device_id);
static_assert(sizeof(idxc_device) == sizeof(DLDevice), "idxc_device");
SAME(idxc_dtype, DLDataType, code);
SAME(idxc_dtype, DLDataType, bits);
SAME(idxc_dtype, DLDataType, lanes);
static_assert(sizeof(idxc_dtype) == sizeof(DLDataType), "idxc_dtype");

static_assert(IDXC_DEVICE_CPU == kDLCPU && IDXC_DEVICE_CUDA == kDLCUDA, "device types");
static_assert(IDXC_DEVICE_CUDA_HOST == kDLCUDAHost, "device types");
static_assert(IDXC_DTYPE_INT == kDLInt && IDXC_DTYPE_UINT == kDLUInt, "type codes");
static_assert(IDXC_DTYPE_FLOAT == kDLFloat && IDXC_DTYPE_BFLOAT == kDLBfloat, "type codes");
#if DLPACK_MAJOR_VERSION > 1 || (DLPACK_MAJOR_VERSION == 1 && DLPACK_MINOR_VERSION >= 1)
static_assert(IDXC_DTYPE_FLOAT8_E4M3FN == kDLFloat8_e4m3fn, "type codes");
#endif

int main() {}
