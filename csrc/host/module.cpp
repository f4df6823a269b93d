// vmemory._host: host-side facts and objects that are not tensor operators; includes no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "host/archive.h"

namespace py = pybind11;
using vmemory::host::Archive;
using vmemory::host::Facts;
using vmemory::host::Staging;

namespace {

constexpr std::pair<const char*, const char*> kFacts[] = {
#include "facts.inc"
};

py::dict build_info() {
  py::dict facts;
  for (const auto& [key, value] : kFacts) facts[key] = value;
  return facts;
}

// parts, then numbers [n, 6] int64 and clock [n, 3] float64, all contiguous and of n rows
void stage(Archive& archive, const std::vector<py::buffer>& buffers, uint64_t rows) {
  Staging staging{};
  if (buffers.size() < 2) throw std::invalid_argument("buffers: expected parts, numbers and clock");
  for (size_t i = 0; i + 2 < buffers.size(); ++i)
    staging.parts.push_back(static_cast<const char*>(buffers[i].request().ptr));
  const py::buffer_info numbers = buffers[buffers.size() - 2].request();
  staging.numbers = static_cast<const int64_t*>(numbers.ptr);
  staging.clock = static_cast<const double*>(buffers.back().request().ptr);
  staging.room = static_cast<uint64_t>(numbers.shape.at(0));
  py::gil_scoped_release release;
  archive.stage(staging, rows);
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
    // in a forked process neither the thread nor its locks exist, so there is nothing to wait for
    if (archive->forked()) return;
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
      .def(py::init<uint64_t, const std::vector<uint64_t>&, const std::vector<uint64_t>&, const std::string&,
                    const std::string&>(),
           py::arg("budget"), py::arg("cells"), py::arg("widths"), py::arg("path"), py::arg("tag"), Release())
      // the memory lives as long as the thread that reads it
      .def("stage", &stage, py::arg("buffers"), py::arg("rows"), py::keep_alive<1, 2>())
      .def("put", &Archive::put, py::arg("n"), Release())
      .def("busy", &Archive::busy, Release())
      .def("wait", &Archive::wait, Release())
      .def("sync", &Archive::sync, Release())
      .def("find", &find_frames, py::arg("stream"), py::arg("t0"), py::arg("t1"), py::arg("any"))
      .def("read", &read_frame, py::arg("sequence"), py::arg("out"))
      .def("erase", &Archive::erase, py::arg("stream"), py::arg("t0"), py::arg("t1"), py::arg("any"), Release())
      .def("next", &Archive::next, Release())
      .def("held", &Archive::held, Release())
      .def_property_readonly("forked", &Archive::forked)
      .def_property_readonly("capacity", &Archive::capacity);
}
