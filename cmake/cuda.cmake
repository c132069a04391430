# Finds nvcc and defines bitnet_ext_cuda_kernels, an object library of torch-free .cu files.
# Sets BITNET_EXT_CUDA_ARCHS, the architectures, and BITNET_EXT_CUDA_REASON, why these or why none.
#
# nvcc: CUDACXX, else on PATH, else under CUDA_HOME or CUDA_PATH, else under /usr/local/cuda.

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF) # set per target, after the compiler's version is known
endif()
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE) # a toolkit may have been installed since the last configuration
  if("$ENV{CUDACXX}" STREQUAL "")
    find_program(_nvcc nvcc NO_CACHE)
    find_program(_nvcc nvcc NO_CACHE
      PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin NO_DEFAULT_PATH)
    if(_nvcc)
      set(ENV{CUDACXX} "${_nvcc}")
    endif()
  endif()
endif()
include(CheckLanguage)
check_language(CUDA)
set(NVCC_VERSION "")
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  set(NVCC_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE NVCC_CODES)
  string(REGEX MATCHALL "sm_[0-9a-z]+" NVCC_CODES "${NVCC_CODES}")
elseif("$ENV{CUDACXX}" STREQUAL "")
  set(NVCC_MISSING "no CUDA compiler (nvcc) is on PATH, in CUDA_HOME or in /usr/local/cuda")
else()
  set(NVCC_MISSING "$ENV{CUDACXX} does not compile CUDA code with this host compiler")
endif()
# Asked only where it matters: torch needs seconds to look.
if(NOT "${TORCH_CUDA_VERSION}" STREQUAL "" AND NOT "${NVCC_VERSION}" STREQUAL ""
    AND "$ENV{BITNET_EXT_CUDA_ARCHS}$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  bitnet_ext_ask_torch(VISIBLE_GPUS --gpus)
endif()
bitnet_ext_choose_archs(BITNET_EXT_CUDA_ARCHS BITNET_EXT_CUDA_REASON)

if(NOT BITNET_EXT_CUDA_ARCHS STREQUAL "")
  file(GLOB _cuda_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
  add_library(bitnet_ext_cuda_kernels OBJECT ${_cuda_sources})
  set_target_properties(bitnet_ext_cuda_kernels PROPERTIES
    CUDA_ARCHITECTURES "${BITNET_EXT_CUDA_ARCHS}"
    CUDA_STANDARD 17
    CUDA_VISIBILITY_PRESET hidden
    POSITION_INDEPENDENT_CODE ON)
  target_include_directories(bitnet_ext_cuda_kernels PRIVATE csrc)
  if("${BITNET_EXT_CUDA_ARCHS}" MATCHES "90a")
    target_compile_definitions(bitnet_ext_cuda_kernels PRIVATE BITNET_EXT_SM90A)
  endif()
  # -lineinfo costs nothing at run time and lets a profiler name the line.
  target_compile_options(bitnet_ext_cuda_kernels PRIVATE
    -lineinfo --expt-relaxed-constexpr --threads=2 -Xcompiler=-Wall)
  # A sixth of the size (5 instead of 32 MB); every driver that runs CUDA 13 can unpack it.
  if(NVCC_VERSION VERSION_GREATER_EQUAL 13.0)
    target_compile_options(bitnet_ext_cuda_kernels PRIVATE --compress-mode=size)
  endif()
  # The operators themselves are compiled by the host compiler and call the runtime too. It is linked in, so the
  # module depends on the driver only and not on the toolkit's version.
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(bitnet_ext_cuda_kernels PUBLIC CUDA::cudart_static)
endif()
