# Defines torch_stable: the headers and libraries an extension needs for torch's stable ABI.
#
# find_package(Torch) is avoided on purpose: with a CUDA build of torch it insists on a CUDA toolkit
# even for CPU sources, and it overrides CMAKE_CUDA_ARCHITECTURES. The stable ABI needs one include
# folder and three libraries.

# Facts about the torch of this interpreter, one per line. pip's isolated build hides site-packages with a
# sitecustomize.py on PYTHONPATH. A torch that the build environment holds comes first; else the environment's
# own is used, so nobody downloads a second one.
function(bitnet_ext_ask_torch out_facts)
  foreach(_unset "" "--unset=PYTHONPATH;--unset=PYTHONNOUSERSITE")
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env ${_unset}
        ${Python_EXECUTABLE} "${CMAKE_CURRENT_SOURCE_DIR}/build_backend/torch_facts.py" ${ARGN}
      OUTPUT_VARIABLE _facts RESULT_VARIABLE _status ERROR_VARIABLE _error OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(_status EQUAL 0)
      break()
    endif()
  endforeach()
  if(NOT _status EQUAL 0)
    message(FATAL_ERROR "bitnet_ext: ${Python_EXECUTABLE} has no torch (needs >= 2.11): ${_error}")
  endif()
  string(REPLACE "\n" ";" _facts "${_facts}")
  set(${out_facts} "${_facts}" PARENT_SCOPE)
endfunction()

bitnet_ext_ask_torch(_torch)
list(GET _torch 0 TORCH_DIR)
list(GET _torch 1 TORCH_VERSION)
list(GET _torch 2 TORCH_CUDA_VERSION)
if(TORCH_CUDA_VERSION STREQUAL "none")
  set(TORCH_CUDA_VERSION "")
endif()
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "bitnet_ext: torch is ${TORCH_VERSION} (${TORCH_DIR}); needed is torch >= 2.11")
endif()
message(STATUS "bitnet_ext: torch ${TORCH_VERSION} (${TORCH_DIR})")

if(CMAKE_CROSSCOMPILING)
  # The linker needs torch's library for its name only: the process has loaded the real one before.
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/empty.cpp" "")
  add_library(torch_cpu SHARED "${CMAKE_CURRENT_BINARY_DIR}/empty.cpp")
  set(TORCH_CPU_LIBRARY -Wl,--no-as-needed torch_cpu)
else()
  find_library(TORCH_LIBRARY torch PATHS "${TORCH_DIR}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
  find_library(TORCH_CPU_LIBRARY torch_cpu PATHS "${TORCH_DIR}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_DIR}/include")
# 2.10: the oldest ABI with TORCH_BOX and parallel_for. Headers newer than it are hidden, so one binary
# runs on every later torch.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(torch_stable INTERFACE ${TORCH_CPU_LIBRARY})

# A CUDA torch resolves aoti_torch_get_current_cuda_stream through libtorch.so only, and the linker
# would drop that library as unused.
add_library(torch_stable_cuda INTERFACE)
target_link_libraries(torch_stable_cuda INTERFACE torch_stable -Wl,--no-as-needed ${TORCH_LIBRARY})
target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
