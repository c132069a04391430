# The CPU sources, one file per instruction set with flags of its own; the choice is made at run time.

# The kernels first: they take longest to compile.
set(BITNET_EXT_CPU_SOURCES csrc/cpu/kernels_scalar.cpp)
set(_isa_flags_scalar -fno-lto)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND BITNET_EXT_CPU_SOURCES csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
  set(_isa_flags_avx2 -fno-lto -mavx2 -mfma -mf16c)
  # GCC 12's own intrinsic headers start some results from an undefined register and then warn about it.
  set(_isa_flags_avx512 -fno-lto -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
    -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(_plain csrc/cpu/features.cpp) # has no header of torch to precompile
foreach(_source IN LISTS BITNET_EXT_CPU_SOURCES)
  string(REGEX MATCH "kernels_([a-z0-9]+)" _ "${_source}")
  set_source_files_properties(${_source} PROPERTIES COMPILE_OPTIONS "${_isa_flags_${CMAKE_MATCH_1}}")
  list(APPEND _plain ${_source})
endforeach()
set_source_files_properties(${_plain} csrc/module.cpp PROPERTIES SKIP_PRECOMPILE_HEADERS ON)

list(APPEND BITNET_EXT_CPU_SOURCES
  csrc/cpu/features.cpp csrc/cpu/dispatch.cpp csrc/cpu/operators.cpp csrc/cpu/quantize.cpp csrc/cpu/packing.cpp
  csrc/cpu/matmul.cpp csrc/cpu/bit_linear.cpp csrc/cpu/glu.cpp csrc/cpu/rms_norm.cpp csrc/cpu/fused_quantize.cpp
  csrc/cpu/optimizer.cpp csrc/cpu/softmax.cpp)
