// vmemory._host: host-side facts and objects that are not tensor operators; includes no torch header.
#include <pybind11/pybind11.h>

#include <utility>

namespace py = pybind11;

namespace {

constexpr std::pair<const char*, const char*> kFacts[] = {
#include "facts.inc"
};

py::dict build_info() {
  py::dict facts;
  for (const auto& [key, value] : kFacts) facts[key] = value;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side part of vmemory: build facts.";
  m.def("build_info", &build_info,
        "Facts of the build as a dict of strings: cpu_arch, cuda_archs, compiler, nvcc, torch, commit, python.");
}
