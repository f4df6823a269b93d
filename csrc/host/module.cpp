// vmemory._host: host-side facts and objects that are not tensor operators; includes no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "host/archive.h"

namespace py = pybind11;
using vmemory::host::Archive;
using vmemory::host::Facts;

namespace {

constexpr std::pair<const char*, const char*> kFacts[] = {
#include "facts.inc"
};

py::dict build_info() {
  py::dict facts;
  for (const auto& [key, value] : kFacts) facts[key] = value;
  return facts;
}

bool put_frame(Archive& archive, const py::buffer& payload, const std::array<int64_t, 6>& numbers,
               const std::array<double, 3>& clock, bool wait) {
  const py::buffer_info bytes = payload.request();
  py::gil_scoped_release release;
  return archive.put(bytes.ptr, static_cast<uint64_t>(bytes.size * bytes.itemsize), {numbers, clock}, wait);
}

py::list find_frames(Archive& archive, int64_t stream, double t0, double t1, bool any) {
  std::vector<std::pair<uint64_t, Facts>> found;
  {
    py::gil_scoped_release release;
    found = archive.find(stream, t0, t1, any);
  }
  py::list out;
  for (const auto& [sequence, facts] : found) out.append(py::make_tuple(sequence, facts.numbers, facts.clock));
  return out;
}

uint64_t read_frame(Archive& archive, uint64_t sequence, const py::buffer& out) {
  const py::buffer_info bytes = out.request(true);
  py::gil_scoped_release release;
  return archive.read(sequence, bytes.ptr, static_cast<uint64_t>(bytes.size * bytes.itemsize));
}

// the worker is joined without the interpreter's lock
struct Freed {
  void operator()(Archive* archive) const {
    py::gil_scoped_release release;
    delete archive;
  }
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side part of vmemory: build facts, the archive of frames that left a memory.";
  m.def("build_info", &build_info,
        "Facts of the build as a dict of strings: cpu_arch, cuda_archs, compiler, nvcc, torch, commit, python.");
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Archive, std::unique_ptr<Archive, Freed>>(
      m, "Archive", "Bounded store of frames in RAM or in a memory-mapped file, written by a thread of its own.")
      .def(py::init<uint64_t, uint64_t, const std::string&, const std::string&>(), py::arg("budget"),
           py::arg("payload"), py::arg("path"), py::arg("tag"), Release())
      .def("put", &put_frame, py::arg("payload"), py::arg("numbers"), py::arg("clock"), py::arg("wait"))
      .def("flush", &Archive::flush, Release())
      .def("find", &find_frames, py::arg("stream"), py::arg("t0"), py::arg("t1"), py::arg("any"))
      .def("read", &read_frame, py::arg("sequence"), py::arg("out"))
      .def("erase", &Archive::erase, py::arg("stream"), py::arg("t0"), py::arg("t1"), Release())
      .def("held", &Archive::held, Release())
      .def_property_readonly("capacity", &Archive::capacity);
}
