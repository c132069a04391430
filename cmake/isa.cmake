# The CPU sources, one file per instruction set with flags of its own; the choice is made at run time.
# Contraction to fused multiply-add is off everywhere: every instruction set must round alike.

set(BITNET_EXT_CPU_SOURCES
  csrc/cpu/features.cpp csrc/cpu/dispatch.cpp csrc/cpu/kernels_scalar.cpp
  csrc/cpu/operators.cpp csrc/cpu/quantize.cpp csrc/cpu/packing.cpp csrc/cpu/matmul.cpp csrc/cpu/bit_linear.cpp
  csrc/cpu/glu.cpp csrc/cpu/rms_norm.cpp
  csrc/cpu/fused_quantize.cpp csrc/cpu/optimizer.cpp csrc/cpu/softmax.cpp)
set(_isa_flags_scalar -fno-lto)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND BITNET_EXT_CPU_SOURCES csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
  set(_isa_flags_avx2 -fno-lto -mavx2 -mfma -mf16c)
  # GCC 12's own intrinsic headers start some results from an undefined register and then warn about it.
  set(_isa_flags_avx512 -fno-lto -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
    -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

foreach(_source IN LISTS BITNET_EXT_CPU_SOURCES)
  set(_flags -ffp-contract=off)
  if(_source MATCHES "kernels_([a-z0-9]+)\\.cpp$")
    list(APPEND _flags ${_isa_flags_${CMAKE_MATCH_1}})
  endif()
  set_source_files_properties(${_source} PROPERTIES COMPILE_OPTIONS "${_flags}")
endforeach()
