# Headers of others: an installed CMake package (apt), a PyPI wheel of the Python that runs, or a download, in this order.
# based_json: nlohmann-json. based_find_gtest: GoogleTest. based_find_pybind11: pybind11, which is not downloaded.
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

# Sets `out` to the folder of an unpacked archive, kept in the build folder.
function(based_download out name url hash)
  set(folder ${CMAKE_BINARY_DIR}/_deps/${name})
  if(NOT EXISTS ${folder}/complete)
    message(STATUS "based: ${name} is not installed; fetching ${url}")
    set(archive ${CMAKE_BINARY_DIR}/_deps/${name}.archive)
    file(DOWNLOAD ${url} ${archive} STATUS status TIMEOUT 120 INACTIVITY_TIMEOUT 20)
    list(POP_FRONT status failed)
    if(NOT failed)
      file(SHA256 ${archive} found)
      if(NOT found STREQUAL hash)
        set(failed 1)
        set(status "SHA-256 ${found}, expected ${hash}")
      endif()
    endif()
    if(failed)
      file(REMOVE ${archive})
      message(FATAL_ERROR "${name} is not installed, and ${url} did not come (${status}). Without the network: "
                          "apt install nlohmann-json3-dev libgtest-dev, or pip install nlohmann-json ros-gtest-vendor in "
                          "the Python environment of this shell. The tests need GoogleTest: BASED_BUILD_TESTS=OFF")
    endif()
    file(ARCHIVE_EXTRACT INPUT ${archive} DESTINATION ${folder})
    file(REMOVE ${archive})
    file(TOUCH ${folder}/complete)
  endif()
  file(GLOB inside LIST_DIRECTORIES true ${folder}/*)
  list(FILTER inside EXCLUDE REGEX "/complete$")
  set(${out} ${inside} PARENT_SCOPE)
endfunction()

add_library(based_json INTERFACE)
find_package(nlohmann_json 3.11 QUIET)
if(nlohmann_json_FOUND)
  target_link_libraries(based_json INTERFACE nlohmann_json::nlohmann_json)
else()
  based_python_path(json_include
    "import os, nlohmann_json as m; print(os.path.join(os.path.dirname(m.__file__), 'include'))")
  if(NOT json_include)
    based_download(
      json_source nlohmann-json https://github.com/nlohmann/json/releases/download/v3.12.0/json.tar.xz
      42f6e95cad6ec532fd372391373363b62a14af6d771056dbfc86160e6dfff7aa)
    set(json_include ${json_source}/include)
  endif()
  target_include_directories(based_json SYSTEM INTERFACE ${json_include})
endif()

# Defines GTest::gtest_main.
macro(based_find_gtest)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    based_python_path(gtest_source "import importlib.metadata as m
print(next(str(f.locate().resolve().parents[1]) for f in m.files('ros-gtest-vendor') if f.name == 'gtest-all.cc'))")
    if(NOT gtest_source)
      based_download(
        gtest_source GoogleTest
        https://github.com/google/googletest/releases/download/v1.15.2/googletest-1.15.2.tar.gz
        7b42b4d6ed48810c5362c265a17faebe90dc2373c885e5216439d37927f02926)
      set(gtest_source ${gtest_source}/googletest)
    endif()
    add_library(based_gtest STATIC ${gtest_source}/src/gtest-all.cc ${gtest_source}/src/gtest_main.cc)
    target_include_directories(based_gtest SYSTEM PUBLIC ${gtest_source}/include PRIVATE ${gtest_source})
    target_link_libraries(based_gtest PUBLIC Threads::Threads)
    if(BASED_SANITIZE)
      target_compile_options(based_gtest PUBLIC -fsanitize=${BASED_SANITIZE} PRIVATE -O0)
    endif()
    add_library(GTest::gtest_main ALIAS based_gtest)
  endif()
endmacro()

# pybind11 3.1 or later, and the Python that it is for.
macro(based_find_pybind11)
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
  set(BASED_PYTHON_FOR_PACKAGES ${Python_EXECUTABLE})
  based_python_path(pybind11_folder "import pybind11; print(pybind11.get_cmake_dir())")
  find_package(pybind11 3.1 CONFIG QUIET HINTS "${pybind11_folder}")
  if(NOT pybind11_FOUND)
    message(FATAL_ERROR "BASED_BUILD_PYTHON needs pybind11 3.1 or later: "
                        "pip install \"pybind11>=3.1\" in the environment of ${Python_EXECUTABLE}")
  endif()
endmacro()
