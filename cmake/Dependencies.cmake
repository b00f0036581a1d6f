# nlohmann-json, headers only: an installed CMake package, the PyPI wheel of the running Python environment, or a
# download, in this order. GoogleTest likewise (based_find_gtest), from the wheel ros-gtest-vendor.
include(FetchContent)

find_program(BASED_PYTHON_FOR_PACKAGES NAMES python3 python DOC "Python whose environment may hold headers from PyPI")
if(Python_EXECUTABLE)
  set(BASED_PYTHON_FOR_PACKAGES ${Python_EXECUTABLE})
endif()

# Sets `out` to the first existing path that `expression` (Python) prints, else to "".
function(based_python_path out expression)
  set(path "")
  if(BASED_PYTHON_FOR_PACKAGES)
    execute_process(COMMAND ${BASED_PYTHON_FOR_PACKAGES} -c "${expression}" OUTPUT_VARIABLE path
                    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(path AND EXISTS "${path}")
    set(${out} "${path}" PARENT_SCOPE)
  else()
    set(${out} "" PARENT_SCOPE)
  endif()
endfunction()

add_library(based_json INTERFACE)
find_package(nlohmann_json 3.11 QUIET)
if(nlohmann_json_FOUND)
  target_link_libraries(based_json INTERFACE nlohmann_json::nlohmann_json)
else()
  based_python_path(json_include
    "import os, nlohmann_json as m; print(os.path.join(os.path.dirname(m.__file__), 'include'))")
  if(NOT json_include)
    FetchContent_Declare(nlohmann_json_headers
      URL https://github.com/nlohmann/json/releases/download/v3.12.0/json.tar.xz)
    FetchContent_MakeAvailable(nlohmann_json_headers)
    set(json_include ${nlohmann_json_headers_SOURCE_DIR}/include)
  endif()
  target_include_directories(based_json SYSTEM INTERFACE ${json_include})
endif()

# Defines GTest::gtest_main.
macro(based_find_gtest)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    based_python_path(gtest_source "import os, sys; print(os.path.join(sys.prefix, 'src', 'gtest_vendor'))")
    if(gtest_source)
      add_library(based_gtest STATIC ${gtest_source}/src/gtest-all.cc ${gtest_source}/src/gtest_main.cc)
      target_include_directories(based_gtest SYSTEM PUBLIC ${gtest_source}/include PRIVATE ${gtest_source})
      target_link_libraries(based_gtest PUBLIC Threads::Threads)
      if(BASED_SANITIZE)
        target_compile_options(based_gtest PUBLIC -fsanitize=${BASED_SANITIZE} PRIVATE -O0)
      endif()
      add_library(GTest::gtest_main ALIAS based_gtest)
    else()
      FetchContent_Declare(googletest
        URL https://github.com/google/googletest/releases/download/v1.15.2/googletest-1.15.2.tar.gz)
      set(INSTALL_GTEST OFF CACHE INTERNAL "")
      FetchContent_MakeAvailable(googletest)
    endif()
  endif()
endmacro()
