# Finds the CUDA toolkit if STAGECOACH_CUDA asks for it, and sets HAVE_CUDA.
#
# CMake 3.25 does not know nvcc 13: neither how it is told C++20 nor all of its architectures, so both
# are spelt out here.
include(cmake/native_architectures.cmake)

set(HAVE_CUDA OFF)
if(STAGECOACH_CUDA)  # ON or AUTO
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(NVCC nvcc HINTS /usr/local/cuda/bin)
    if(NVCC)
      set(CMAKE_CUDA_COMPILER ${NVCC})
    endif()
  endif()
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    enable_language(CUDA)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    find_package(CUDAToolkit REQUIRED)
    set(HAVE_CUDA ON)
  elseif(STAGECOACH_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA backend left out: no nvcc found")
  else()
    message(FATAL_ERROR "STAGECOACH_CUDA is ON but no nvcc was found; set CMAKE_CUDA_COMPILER or "
                        "use -DSTAGECOACH_CUDA=OFF")
  endif()
endif()

if(HAVE_CUDA)
  set(cuda_architectures ${STAGECOACH_CUDA_ARCHITECTURES})
  if(NOT cuda_architectures OR cuda_architectures STREQUAL "native")
    stagecoach_native_architectures(cuda_architectures)
  endif()
  message(STATUS "CUDA backend: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures "
                 "${cuda_architectures}")
  # No contraction, as for the host: two kernels that must agree to the bit say fma where they mean
  # it.
  set(cuda_flags -fmad=false --expt-relaxed-constexpr
      -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers,-ffp-contract=off)
  if(STAGECOACH_WERROR)
    list(APPEND cuda_flags -Werror=all-warnings)
  endif()
  foreach(architecture ${cuda_architectures})
    string(REGEX MATCH "^[0-9]+" capability "${architecture}")
    if(NOT capability)
      message(FATAL_ERROR "STAGECOACH_CUDA_ARCHITECTURES: '${architecture}' is no architecture: give "
                          "native alone, or a list such as \"86;90a\"")
    elseif(capability LESS cuda_least_architecture)
      message(FATAL_ERROR "STAGECOACH_CUDA_ARCHITECTURES: the kernels need compute capability 8.0; "
                          "leave out '${architecture}'")
    endif()
    list(APPEND cuda_flags
         "SHELL:-gencode arch=compute_${architecture},code=sm_${architecture}")
  endforeach()
  if(STAGECOACH_CUDA_PTX)  # of the last one, for GPUs to come
    list(GET cuda_architectures -1 architecture)
    list(APPEND cuda_flags
         "SHELL:-gencode arch=compute_${architecture},code=compute_${architecture}")
  endif()
endif()

# stagecoach_cuda_library(NAME SRCS a.cu ...): kernels and their launchers.
function(stagecoach_cuda_library name)
  cmake_parse_arguments(arg "" "" "SRCS" ${ARGN})
  add_library(${name} STATIC ${arg_SRCS})
  target_include_directories(${name} PUBLIC ${CMAKE_SOURCE_DIR})
  target_compile_options(${name} PRIVATE ${cuda_flags})
  target_link_libraries(${name} PUBLIC CUDA::cudart_static)
endfunction()

# stagecoach_cuda_binary(NAME SRCS main.cu ... DEPS lib ...): -> build/<preset>/bin/NAME
function(stagecoach_cuda_binary name)
  cmake_parse_arguments(arg "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name}_objects OBJECT ${arg_SRCS})  # apart: flags of DEPS are for the host's compiler
  target_include_directories(${name}_objects PRIVATE ${CMAKE_SOURCE_DIR})
  target_compile_options(${name}_objects PRIVATE ${cuda_flags})
  add_executable(${name} $<TARGET_OBJECTS:${name}_objects>)
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(${name} PRIVATE ${arg_DEPS})
endfunction()
