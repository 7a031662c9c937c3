# STAGECOACH_STATIC: executables that need nothing but glibc at run time (and the GPU's driver, for those
# with the CUDA backend), so that they run on any distribution whose glibc is not older.
#
# Debian's packages hold archives beside their shared libraries, but the CMake files of gRPC, Abseil,
# protobuf and re2 name the latter alone. As their dependencies are declared completely, it suffices to
# name the archives instead. Of fmt and spdlog there are headers only.

if(STAGECOACH_STATIC)
  add_library(stagecoach_fmt STATIC cmake/static_fmt.cc)
  # As for the shared library, so that objects are the same with and without STAGECOACH_STATIC.
  target_compile_definitions(stagecoach_fmt PUBLIC FMT_SHARED)
  add_library(fmt::fmt ALIAS stagecoach_fmt)
  add_library(stagecoach_spdlog INTERFACE)
  target_compile_definitions(stagecoach_spdlog INTERFACE SPDLOG_FMT_EXTERNAL)
  target_link_libraries(stagecoach_spdlog INTERFACE fmt::fmt Threads::Threads)
  add_library(spdlog::spdlog ALIAS stagecoach_spdlog)
else()
  find_package(fmt CONFIG REQUIRED)
  find_package(spdlog CONFIG REQUIRED)
endif()

# Makes every imported target of this folder an archive, where there is one.
function(stagecoach_link_archives)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  # Two that the packages leave to the linker to find.
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=libre2.a
                  OUTPUT_VARIABLE re2 OUTPUT_STRIP_TRAILING_WHITESPACE)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=libatomic.a
                  OUTPUT_VARIABLE atomic OUTPUT_STRIP_TRAILING_WHITESPACE)
  foreach(target ${targets})
    foreach(property IMPORTED_LOCATION IMPORTED_LOCATION_NONE IMPORTED_LOCATION_RELEASE
            INTERFACE_LINK_LIBRARIES)
      get_target_property(values ${target} ${property})
      set(archives "")
      foreach(value ${values})
        string(REPLACE "-lre2" "${re2}" value "${value}")
        string(REPLACE "-latomic" "${atomic}" value "${value}")
        string(REGEX REPLACE "^(/.*/lib[^/]*)\\.so(\\.[0-9.]+)?$" "\\1.a" archive "${value}")
        if(EXISTS "${archive}")
          set(value ${archive})
        endif()
        list(APPEND archives "${value}")
      endforeach()
      if(values)
        set_target_properties(${target} PROPERTIES ${property} "${archives}")
      endif()
    endforeach()
  endforeach()
endfunction()

if(STAGECOACH_STATIC)
  stagecoach_link_archives()
  add_link_options(-static-libgcc -static-libstdc++ -Wl,--as-needed)
endif()
