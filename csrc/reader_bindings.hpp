// Python bindings of the readers: arguments in, arrays out, errors as exceptions with values.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "document_ends.hpp"
#include "row_reader.hpp"

namespace mer::reader_bindings {

namespace py = pybind11;

template <class T>
using Column = py::array_t<T, py::array::c_style>;

template <class T>
const T* column(const Column<T>& array, py::ssize_t size, const char* name) {
    if (array.ndim() != 1 || array.size() != size) {
        throw std::invalid_argument(std::string(name) + " must have the shape (" +
                                    std::to_string(size) + ",)");
    }
    return array.data();
}

inline void read_rows(const Column<std::int32_t>& descriptors, const Column<i64>& bytes,
                      const Column<std::uint8_t>& codes, const Column<i64>& places, i64 vocab_size,
                      Column<i64> out) {
    const py::ssize_t size = descriptors.size();
    if (out.ndim() != 2) throw std::invalid_argument("out must have 2 dimensions");
    const RowRequests requests{size, column(descriptors, size, "descriptors"),
                               column(bytes, size, "bytes"), column(codes, size, "codes"),
                               column(places, size, "places")};
    const i64 num_rows = out.shape(0), length = out.shape(1);
    i64* data = out.mutable_data();
    const py::gil_scoped_release unlocked;
    RowReader(length, vocab_size).read(requests, data, num_rows);
}

inline py::tuple document_ends(const Column<std::int32_t>& descriptors, const Column<i64>& tables,
                               const Column<i64>& starts, i64 length) {
    const py::ssize_t size = descriptors.size();
    const std::int32_t* descriptor = column(descriptors, size, "descriptors");
    const i64* start = column(starts, size, "starts");
    if (tables.ndim() != 2 || tables.shape(0) != size || tables.shape(1) != 4) {
        throw std::invalid_argument("tables must have the shape (" + std::to_string(size) + ", 4)");
    }
    const i64* table = tables.data();
    std::vector<i64> rows, places;
    {
        const py::gil_scoped_release unlocked;
        DocumentEnds ends;
        for (i64 row = 0; row < size; ++row, table += 4) {
            const DocumentTable index{descriptor[row], table[0], table[1], table[2], table[3]};
            if (index.itemsize < 1) throw std::invalid_argument("a token of no bytes");
            ends.find(index, start[row], length, row, [&](i64 place) {
                rows.push_back(row);
                places.push_back(place);
            });
        }
    }
    const py::ssize_t found = static_cast<py::ssize_t>(rows.size());
    return py::make_tuple(Column<i64>(found, rows.data()), Column<i64>(found, places.data()));
}

// Makes the exception class `name`, whose `args` are the values of a thrown Error.
template <class Error>
void bind_error(py::module_& module, const char* name) {
    static PyObject* kind = nullptr;
    kind = py::exception<Error>(module, name, PyExc_ValueError).release().ptr();
    py::register_local_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const Error& error) {
            PyErr_SetObject(kind, py::tuple(py::cast(error.values())).ptr());
        }
    });
}

inline void bind_reader(py::module_& module) {
    using namespace py::literals;
    bind_error<ReadEnded>(module, "ReadEnded");
    bind_error<ReadFailed>(module, "ReadFailed");
    bind_error<TokenOutside>(module, "TokenOutside");
    bind_error<DocumentFault>(module, "DocumentFault");
    module.def("read_rows", &read_rows, "descriptors"_a.noconvert(), "bytes"_a.noconvert(),
               "codes"_a.noconvert(), "places"_a.noconvert(), "vocab_size"_a.noconvert(),
               "out"_a.noconvert());
    module.def("document_ends", &document_ends, "descriptors"_a.noconvert(), "tables"_a.noconvert(),
               "starts"_a.noconvert(), "length"_a.noconvert());
}

}  // namespace mer::reader_bindings

using mer::reader_bindings::bind_reader;
