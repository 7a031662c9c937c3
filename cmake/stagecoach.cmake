# Flags and the three kinds of target that the folders declare.
#
#   stagecoach_library(NAME SRCS a.cc ... DEPS lib ...)
#   stagecoach_binary(NAME SRCS main.cc ... DEPS lib ...)       -> build/<preset>/bin/NAME
#   stagecoach_test(NAME SRCS a_test.cc ... DEPS lib ...)       -> one ctest per TEST()
#   stagecoach_fuzz(NAME SRCS a_fuzz.cc DEPS lib ...)           -> only with STAGECOACH_FUZZ

add_library(stagecoach_flags INTERFACE)
target_include_directories(stagecoach_flags INTERFACE ${CMAKE_SOURCE_DIR})
# No contraction: the bits of a sum must not depend on what the compiler fuses (ARCHITECTURE.md).
target_compile_options(stagecoach_flags INTERFACE -Wall -Wextra -Wno-missing-field-initializers
                       -ffp-contract=off $<$<BOOL:${STAGECOACH_WERROR}>:-Werror>)
if(STAGECOACH_FUZZ)
  target_compile_options(stagecoach_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

if(STAGECOACH_TSAN)
  add_library(stagecoach_tsan OBJECT ${CMAKE_SOURCE_DIR}/cmake/tsan_absl.cc)
  target_link_libraries(stagecoach_tsan PRIVATE absl::synchronization)
endif()
# What an executable is made of besides its own sources.
set(STAGECOACH_EXECUTABLE_OBJECTS "$<$<BOOL:${STAGECOACH_TSAN}>:$<TARGET_OBJECTS:stagecoach_tsan>>")

add_library(stagecoach_test_main OBJECT EXCLUDE_FROM_ALL ${CMAKE_SOURCE_DIR}/tests/test_main.cc)
target_link_libraries(stagecoach_test_main PRIVATE stagecoach_flags GTest::gtest)

function(stagecoach_library name)
  cmake_parse_arguments(arg "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name} STATIC ${arg_SRCS})
  target_link_libraries(${name} PUBLIC stagecoach_flags ${arg_DEPS})
endfunction()

function(stagecoach_binary name)
  cmake_parse_arguments(arg "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${arg_SRCS} ${STAGECOACH_EXECUTABLE_OBJECTS})
  target_link_libraries(${name} PRIVATE stagecoach_flags ${arg_DEPS})
endfunction()

function(stagecoach_test name)
  cmake_parse_arguments(arg "" "TIMEOUT" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${arg_SRCS} ${STAGECOACH_EXECUTABLE_OBJECTS})
  target_link_libraries(${name} PRIVATE stagecoach_flags ${arg_DEPS} stagecoach_test_main
                        GTest::gmock GTest::gtest)
  target_compile_definitions(${name} PRIVATE
    STAGECOACH_SOURCE_DIR="${CMAKE_SOURCE_DIR}" STAGECOACH_BIN_DIR="${CMAKE_BINARY_DIR}/bin")
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  gtest_discover_tests(${name} TEST_PREFIX ${name}. DISCOVERY_MODE PRE_TEST
                       PROPERTIES TIMEOUT ${arg_TIMEOUT})
endfunction()

function(stagecoach_fuzz name)
  if(NOT STAGECOACH_FUZZ)
    return()
  endif()
  cmake_parse_arguments(arg "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${arg_SRCS})
  target_link_libraries(${name} PRIVATE stagecoach_flags ${arg_DEPS})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()
