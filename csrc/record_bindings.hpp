// Python bindings of the records: arguments in, arrays out, errors as exceptions with values.
#pragma once

#include "reader_bindings.hpp"
#include "records.hpp"

namespace mer::record_bindings {

namespace py = pybind11;
using reader_bindings::column;
using reader_bindings::Column;

template <class T>
const T* table(const Column<T>& array, py::ssize_t rows, py::ssize_t columns, const char* name) {
    if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != columns) {
        throw std::invalid_argument(std::string(name) + " must have the shape (" +
                                    std::to_string(rows) + ", " + std::to_string(columns) + ")");
    }
    return array.data();
}

template <class T>
T* filled_table(Column<T>& array, py::ssize_t rows, py::ssize_t columns, const char* name) {
    table(array, rows, columns, name);
    return array.mutable_data();
}

// Requests whose places are rows of arrays of `num_rows`.
inline RecordRequests requests(const Column<std::int32_t>& descriptors, const Column<i64>& bytes,
                               const Column<i64>& places, py::ssize_t num_rows) {
    const py::ssize_t size = descriptors.size();
    const RecordRequests made{size, column(descriptors, size, "descriptors"),
                              column(bytes, size, "bytes"), column(places, size, "places")};
    for (i64 row = 0; row < made.count; ++row) {
        if (made.place[row] < 0 || made.place[row] >= num_rows) {
            throw std::invalid_argument("place " + std::to_string(made.place[row]) + " of " +
                                        std::to_string(num_rows) + " rows");
        }
    }
    return made;
}

inline void write(const Records& records, const Column<std::int32_t>& descriptors,
                  const Column<i64>& bytes, const Column<i64>& places, const Column<i64>& identity,
                  const Column<i64>& tokens, const Column<std::uint8_t>& ends,
                  const Column<i64>& num_ends) {
    const py::ssize_t size = num_ends.size();
    const RecordRequests rows = requests(descriptors, bytes, places, size);
    const i64* identities = table(identity, size, 3, "identity");
    const i64* ids = table(tokens, size, records.num_tokens(), "tokens");
    const std::uint8_t* bits = table(ends, size, records.end_bytes(), "ends");
    const i64* counts = column(num_ends, size, "num_ends");
    const py::gil_scoped_release unlocked;
    records.write(rows, identities, ids, bits, counts);
}

inline void read(const Records& records, const Column<std::int32_t>& descriptors,
                 const Column<i64>& bytes, const Column<i64>& places, const Column<i64>& identity,
                 Column<i64> tokens, Column<std::uint8_t> ends) {
    const py::ssize_t size = tokens.size() / records.num_tokens();
    const RecordRequests rows = requests(descriptors, bytes, places, size);
    const i64* identities = table(identity, size, 3, "identity");
    i64* ids = filled_table(tokens, size, records.num_tokens(), "tokens");
    std::uint8_t* bits = filled_table(ends, size, records.end_bytes(), "ends");
    const py::gil_scoped_release unlocked;
    records.read(rows, identities, ids, bits);
}

inline void count_ends(const Records& records, const Column<std::int32_t>& descriptors,
                       const Column<i64>& bytes, const Column<i64>& places,
                       const Column<i64>& identity, Column<i64> counts) {
    const py::ssize_t size = counts.size();
    const RecordRequests rows = requests(descriptors, bytes, places, size);
    const i64* identities = table(identity, size, 3, "identity");
    column(counts, size, "counts");
    i64* out = counts.mutable_data();
    const py::gil_scoped_release unlocked;
    records.count_ends(rows, identities, out);
}

inline void fetch(const Records& records, const Column<std::int32_t>& descriptors,
                  const Column<i64>& bytes, const Column<i64>& places, Column<std::uint8_t> out) {
    const py::ssize_t size = out.size() / records.record_bytes();
    const RecordRequests rows = requests(descriptors, bytes, places, size);
    std::uint8_t* content = filled_table(out, size, records.record_bytes(), "out");
    const py::gil_scoped_release unlocked;
    records.fetch(rows, content);
}

inline void store(const Records& records, const Column<std::int32_t>& descriptors,
                  const Column<i64>& bytes, const Column<i64>& places,
                  const Column<std::uint8_t>& content) {
    const py::ssize_t size = content.size() / records.record_bytes();
    const RecordRequests rows = requests(descriptors, bytes, places, size);
    const std::uint8_t* data = table(content, size, records.record_bytes(), "content");
    const py::gil_scoped_release unlocked;
    records.store(rows, data);
}

inline Column<std::uint8_t> erased(const Records& records) {
    const std::vector<unsigned char> content = records.erased();
    return Column<std::uint8_t>({py::ssize_t{1}, static_cast<py::ssize_t>(content.size())},
                                content.data());
}

inline void bind_records(py::module_& module) {
    using namespace py::literals;
    reader_bindings::bind_error<WriteFailed>(module, "WriteFailed");
    reader_bindings::bind_error<RecordFault>(module, "RecordFault");
    module.attr("RECORD_MAGIC") = kRecordMagic;
    module.attr("ERASED_MAGIC") = kErasedMagic;
    const auto descriptors = "descriptors"_a.noconvert();
    const auto bytes = "bytes"_a.noconvert(), places = "places"_a.noconvert();
    const auto identity = "identity"_a.noconvert();
    py::class_<Records>(module, "Records")
        .def(py::init<i64, i64, bool, u64>(), py::kw_only(), "seq_length"_a.noconvert(),
             "vocab_size"_a.noconvert(), "with_ends"_a.noconvert(), "key"_a.noconvert())
        .def_property_readonly("record_bytes", &Records::record_bytes)
        .def_property_readonly("end_bytes", &Records::end_bytes)
        .def("write", &write, descriptors, bytes, places, identity, "tokens"_a.noconvert(),
             "ends"_a.noconvert(), "num_ends"_a.noconvert())
        .def("read", &read, descriptors, bytes, places, identity, "tokens"_a.noconvert(),
             "ends"_a.noconvert())
        .def("count_ends", &count_ends, descriptors, bytes, places, identity,
             "counts"_a.noconvert())
        .def("fetch", &fetch, descriptors, bytes, places, "out"_a.noconvert())
        .def("store", &store, descriptors, bytes, places, "content"_a.noconvert())
        .def("erased", &erased);
}

}  // namespace mer::record_bindings

using mer::record_bindings::bind_records;
