# Finds nvcc and defines bitnet_ext_cuda_kernels, an object library of torch-free .cu files.
# Sets BITNET_EXT_CUDA_FOUND and BITNET_EXT_CUDA_ARCHS, or BITNET_EXT_CUDA_MISSING, the reason in words.
#
# nvcc: CUDACXX, else on PATH, else under CUDA_HOME or CUDA_PATH, else under /usr/local/cuda.
# Architectures: BITNET_EXT_CUDA_ARCHS=... (CMake's form, "80-real 90a-real") or TORCH_CUDA_ARCH_LIST
# (torch's form, "8.0 9.0a+PTX") override the defaults below.

set(BITNET_EXT_CUDA_FOUND OFF)
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
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
    set(BITNET_EXT_CUDA_MISSING
      "nvcc is ${CMAKE_CUDA_COMPILER_VERSION} (${CMAKE_CUDA_COMPILER}) and needed is 12.4 or newer")
  else()
    set(BITNET_EXT_CUDA_FOUND ON)
  endif()
elseif("$ENV{CUDACXX}" STREQUAL "")
  set(BITNET_EXT_CUDA_MISSING "no CUDA compiler (nvcc) is on PATH, in CUDA_HOME or in /usr/local/cuda")
else()
  set(BITNET_EXT_CUDA_MISSING "$ENV{CUDACXX} does not compile CUDA code with this host compiler")
endif()

if(BITNET_EXT_CUDA_FOUND)
  if(NOT "$ENV{BITNET_EXT_CUDA_ARCHS}" STREQUAL "")
    string(REGEX REPLACE "[ ,;]+" ";" BITNET_EXT_CUDA_ARCHS "$ENV{BITNET_EXT_CUDA_ARCHS}")
    foreach(_arch IN LISTS BITNET_EXT_CUDA_ARCHS)
      if(NOT _arch MATCHES "^[0-9]+[af]?(-real|-virtual)?$")
        message(FATAL_ERROR
          "BITNET_EXT_CUDA_ARCHS names '${_arch}'; accepted are forms such as 80-real, 90a-real and 90-virtual")
      endif()
    endforeach()
  elseif(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    string(REGEX REPLACE "[ ,;]+" ";" _list "$ENV{TORCH_CUDA_ARCH_LIST}")
    foreach(_arch IN LISTS _list)
      if(NOT _arch MATCHES "^[0-9]+\\.[0-9]+a?(\\+PTX)?$")
        message(FATAL_ERROR
          "TORCH_CUDA_ARCH_LIST names '${_arch}'; accepted are forms such as 8.0, 9.0a and 9.0+PTX")
      endif()
      string(REPLACE "." "" _number "${_arch}")
      if(_number MATCHES "\\+PTX$")
        string(REPLACE "+PTX" "" _number "${_number}")
        list(APPEND BITNET_EXT_CUDA_ARCHS "${_number}")
      else()
        list(APPEND BITNET_EXT_CUDA_ARCHS "${_number}-real")
      endif()
    endforeach()
  else()
    # Machine code for the data-centre and desktop chips in use; PTX of the newest for what comes later.
    set(BITNET_EXT_CUDA_ARCHS 80-real 86-real 89-real 90a-real)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND BITNET_EXT_CUDA_ARCHS 100-real 120-real 90-virtual)
    else()
      list(APPEND BITNET_EXT_CUDA_ARCHS 90-virtual)
    endif()
  endif()

  message(STATUS "bitnet_ext: CUDA operators with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${BITNET_EXT_CUDA_ARCHS}")

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
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
    target_compile_options(bitnet_ext_cuda_kernels PRIVATE --compress-mode=size)
  endif()
  # The operators themselves are compiled by the host compiler and call the runtime too. It is linked in, so the
  # module depends on the driver only and not on the toolkit's version.
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(bitnet_ext_cuda_kernels PUBLIC CUDA::cudart_static)
endif()
