// Python bindings of the plan. Nothing is computed here: arguments in, arrays out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "buffer_log.hpp"
#include "plan.hpp"
#include "reader_bindings.hpp"
#include "record_bindings.hpp"

namespace py = pybind11;
using namespace py::literals;
using mer::i64;
using mer::u64;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::vector<T> to_vector(const Array<T>& array, const char* name) {
    if (array.ndim() != 1) {
        throw std::invalid_argument(std::string(name) + " must have 1 dimension, not " +
                                    std::to_string(array.ndim()));
    }
    return std::vector<T>(array.data(), array.data() + array.size());
}

template <class T>
Array<T> to_array(const std::vector<T>& values) {
    return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

mer::SpanSpec make_spec(i64 position, i64 task, const Array<i64>& datasets,
                        const Array<double>& weights, i64 batches, i64 fresh_rows,
                        bool trained_before) {
    return {position,
            task,
            to_vector(datasets, "datasets"),
            to_vector(weights, "weights"),
            batches,
            fresh_rows,
            trained_before};
}

std::unique_ptr<mer::Plan> make_plan(u64 seed, const Array<u64>& dataset_keys,
                                     const Array<i64>& dataset_sizes,
                                     const Array<i64>& buffer_capacities, bool buffer_by_task) {
    std::vector<u64> keys = to_vector(dataset_keys, "dataset_keys");
    std::vector<i64> sizes = to_vector(dataset_sizes, "dataset_sizes");
    mer::BufferSpec buffer{to_vector(buffer_capacities, "buffer_capacities"), buffer_by_task};
    const py::gil_scoped_release unlocked;
    return std::make_unique<mer::Plan>(seed, std::move(keys), std::move(sizes), std::move(buffer));
}

void append(mer::Plan& plan, i64 first_batch, i64 global_batch_size, i64 alpha_numerator,
            i64 alpha_denominator, bool include_current_task, const Array<double>& task_weights,
            bool from_buffer, const Array<i64>& dropped, const std::vector<mer::SpanSpec>& spans) {
    mer::ReplaySpec replay{mer::Fraction{alpha_numerator, alpha_denominator}, include_current_task,
                           to_vector(task_weights, "task_weights"), from_buffer};
    std::vector<i64> gone = to_vector(dropped, "dropped");
    const py::gil_scoped_release unlocked;
    plan.append(first_batch, global_batch_size, std::move(replay), std::move(gone), spans);
}

// A row a span: position, task, segment, first batch, last batch, trained before.
Array<i64> spans(const mer::Plan& plan) {
    const std::vector<mer::Span> all = plan.spans();
    Array<i64> table({static_cast<py::ssize_t>(all.size()), static_cast<py::ssize_t>(6)});
    i64* out = table.mutable_data();
    for (const mer::Span& span : all) {
        for (const i64 value : {span.spec.position, span.spec.task, span.segment, span.first_batch,
                                span.last_batch(), static_cast<i64>(span.spec.trained_before)}) {
            *out++ = value;
        }
    }
    return table;
}

py::tuple rows(const mer::Plan& plan, i64 batch, i64 start, std::optional<i64> stop) {
    const i64 all = plan.global_batch_size(batch);
    const i64 end = stop.value_or(all);
    const py::ssize_t size = std::max<i64>(end - start, 0);  // wrong ranges are refused below
    if (size > all) {
        throw std::invalid_argument("a batch has " + std::to_string(all) + " rows, not " +
                                    std::to_string(size));
    }
    Array<std::uint8_t> kind(size);
    Array<std::int32_t> entry(size), dataset(size);
    Array<i64> sample(size), ordinal(size), slot(size);
    const mer::RowColumns columns{kind.mutable_data(),    entry.mutable_data(),
                                  dataset.mutable_data(), sample.mutable_data(),
                                  ordinal.mutable_data(), slot.mutable_data()};
    {
        const py::gil_scoped_release unlocked;
        plan.rows(batch, start, end, columns);
    }
    return py::make_tuple(kind, entry, dataset, sample, ordinal, slot);
}

template <class T>
py::list to_arrays(const std::vector<std::vector<T>>& many) {
    py::list arrays;
    for (const std::vector<T>& one : many) arrays.append(to_array(one));
    return arrays;
}

py::tuple ledger(mer::Plan& plan, i64 batches) {
    mer::Ledger result;
    {
        const py::gil_scoped_release unlocked;
        result = plan.ledger(batches);
    }
    return py::make_tuple(to_arrays(result.fresh), to_arrays(result.replayed),
                          to_arrays(result.skipped), to_array(result.batches),
                          to_array(result.replay_rows), to_array(result.pool_batches));
}

Array<u64> permute(const mer::Permutation& permutation, u64 key, const Array<u64>& indices,
                   bool inverse) {
    std::vector<u64> values = to_vector(indices, "indices");
    {
        const py::gil_scoped_release unlocked;
        for (u64& value : values) {
            value = inverse ? permutation.inverse(key, value) : permutation.forward(key, value);
        }
    }
    return to_array(values);
}

// The core trusts its callers here, since it asks once or twice for every row.
const mer::WeightTree& checked(const mer::WeightTree& tree, i64 n, i64 leaf = 0) {
    if (n < 0 || n > static_cast<i64>(mer::kMaxSize) || leaf < 0 || leaf >= tree.num_leaves()) {
        throw std::invalid_argument("sample " + std::to_string(n) + " of dataset " +
                                    std::to_string(leaf) + " is outside of a blend of " +
                                    std::to_string(tree.num_leaves()) + " datasets");
    }
    return tree;
}

void bind_plan(py::module_& module) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    py::class_<mer::SpanSpec>(module, "SpanSpec")
        .def(py::init(&make_spec), py::kw_only(), "position"_a.noconvert(), "task"_a.noconvert(),
             "datasets"_a.noconvert(), "weights"_a.noconvert(), "batches"_a.noconvert(),
             "fresh_rows"_a.noconvert(), "trained_before"_a.noconvert());
    static py::exception<mer::BufferEmpty> empty(module, "BufferEmpty", PyExc_ValueError);
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const mer::BufferEmpty& error) {
            PyErr_SetObject(empty.ptr(), py::make_tuple(error.batch, error.task).ptr());
        }
    });
    py::class_<mer::Plan>(module, "Plan")
        .def(py::init(&make_plan), py::kw_only(), "seed"_a.noconvert(),
             "dataset_keys"_a.noconvert(), "dataset_sizes"_a.noconvert(),
             "buffer_capacities"_a.noconvert(), "buffer_by_task"_a.noconvert())
        .def("append", &append, py::kw_only(), "first_batch"_a.noconvert(),
             "global_batch_size"_a.noconvert(), "alpha_numerator"_a.noconvert(),
             "alpha_denominator"_a.noconvert(), "include_current_task"_a.noconvert(),
             "task_weights"_a.noconvert(), "from_buffer"_a.noconvert(), "dropped"_a.noconvert(),
             "spans"_a)
        .def_property_readonly("num_slots", &mer::Plan::num_slots)
        .def_property_readonly("total_batches", &mer::Plan::total_batches)
        .def("global_batch_size", &mer::Plan::global_batch_size, "batch"_a.noconvert(), Unlocked())
        .def("spans", &spans)
        .def(
            "cursors_after",
            [](const mer::Plan& plan, i64 span) { return to_array(plan.cursors_after(span)); },
            "span"_a.noconvert())
        .def(
            "cursors_at",
            [](const mer::Plan& plan, i64 batch) { return to_array(plan.cursors_at(batch)); },
            "batch"_a.noconvert())
        .def("fresh_rows_before", &mer::Plan::fresh_rows_before, "batch"_a.noconvert(), Unlocked())
        .def("replay_rows", &mer::Plan::replay_rows, "batch"_a.noconvert(), Unlocked())
        .def("rows", &rows, "batch"_a.noconvert(), "start"_a.noconvert() = 0,
             "stop"_a.noconvert() = py::none())
        .def("mark_skipped", &mer::Plan::mark_skipped, "batch"_a.noconvert(), Unlocked())
        .def("skipped", [](const mer::Plan& plan) { return to_array(plan.skipped()); })
        .def("ledger", &ledger, "batches"_a.noconvert());
}

py::tuple to_tuple(const mer::BufferLog::Writes& writes) {
    return py::make_tuple(to_array(writes.position), to_array(writes.source),
                          to_array(writes.ordinal), to_array(writes.dataset),
                          to_array(writes.sample));
}

Array<i64> find(const mer::BufferLog& log, const Array<i64>& slots, const Array<i64>& ordinals) {
    std::vector<i64> found = to_vector(slots, "slots");
    const std::vector<i64> rows = to_vector(ordinals, "ordinals");
    if (rows.size() != found.size()) throw std::invalid_argument("as many ordinals as slots");
    {
        const py::gil_scoped_release unlocked;
        for (std::size_t i = 0; i < found.size(); ++i) found[i] = log.find(found[i], rows[i]);
    }
    return to_array(found);
}

void bind_buffer(py::module_& module) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    using mer::BufferLog;
    // The plan lives as long as the log, which refers to it.
    py::class_<BufferLog>(module, "BufferLog")
        .def(py::init<const mer::Plan&, i64>(), "plan"_a, "segment_records"_a.noconvert(),
             py::keep_alive<1, 2>())
        .def_property_readonly("batch", &BufferLog::batch)
        .def_property_readonly("tail", &BufferLog::tail)
        .def("live_segments",
             [](const BufferLog& log) {
                 const py::gil_scoped_release unlocked;
                 return log.live_segments();
             })
        .def("content",
             [](const BufferLog& log) {
                 BufferLog::Writes writes;
                 {
                     const py::gil_scoped_release unlocked;
                     writes = log.content();
                 }
                 return to_tuple(writes);
             })
        .def(
            "advance",
            [](BufferLog& log, i64 batch) {
                BufferLog::Writes writes;
                {
                    const py::gil_scoped_release unlocked;
                    writes = log.advance(batch);
                }
                return to_tuple(writes);
            },
            "batch"_a.noconvert())
        .def("settle", &BufferLog::settle, "batch"_a.noconvert(), Unlocked())
        .def("find", &find, "slots"_a.noconvert(), "ordinals"_a.noconvert())
        .def(
            "sources",
            [](const BufferLog& log, const Array<i64>& positions) {
                std::vector<i64> found = to_vector(positions, "positions");
                {
                    const py::gil_scoped_release unlocked;
                    found = log.sources(std::move(found));
                }
                return to_array(found);
            },
            "positions"_a.noconvert());
}

void bind_parts(py::module_& module) {
    py::class_<mer::Permutation>(module, "Permutation")
        .def(py::init<u64>(), "size"_a.noconvert())
        .def(
            "forward",
            [](const mer::Permutation& self, u64 key, const Array<u64>& indices) {
                return permute(self, key, indices, false);
            },
            "key"_a.noconvert(), "indices"_a.noconvert())
        .def(
            "inverse",
            [](const mer::Permutation& self, u64 key, const Array<u64>& images) {
                return permute(self, key, images, true);
            },
            "key"_a.noconvert(), "images"_a.noconvert());
    py::class_<mer::WeightTree>(module, "WeightTree")
        .def_static(
            "from_weights",
            [](const Array<double>& weights) {
                return mer::WeightTree::from_weights(to_vector(weights, "weights"));
            },
            "weights"_a.noconvert())
        .def_static(
            "from_sizes",
            [](const Array<i64>& sizes) {
                return mer::WeightTree::from_sizes(to_vector(sizes, "sizes"));
            },
            "sizes"_a.noconvert())
        .def(
            "locate",
            [](const mer::WeightTree& self, i64 n) {
                const auto place = checked(self, n).locate(n);
                return std::make_pair(place.leaf, place.ordinal);
            },
            "n"_a.noconvert())
        .def(
            "counts",
            [](const mer::WeightTree& self, i64 n) { return to_array(checked(self, n).counts(n)); },
            "n"_a.noconvert())
        .def(
            "count",
            [](const mer::WeightTree& self, i64 leaf, i64 n) {
                return checked(self, n, leaf).count(leaf, n);
            },
            "leaf"_a.noconvert(), "n"_a.noconvert());
}

}  // namespace

PYBIND11_MODULE(_index, module) {
    module.doc() = "Plans of a run: which sample stands at which place of which batch.";
    bind_parts(module);
    bind_plan(module);
    bind_buffer(module);
    bind_reader(module);
    bind_records(module);
}
