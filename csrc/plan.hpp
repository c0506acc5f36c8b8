// The plan: (batch, place) -> (kind, entry, dataset, sample), without an index in memory.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hash.hpp"
#include "held.hpp"
#include "permutation.hpp"
#include "schedule.hpp"

namespace mer {

// Where `rows` writes: one element a row.
struct RowColumns {
    std::uint8_t* kind;  // 0 fresh, 1 replay
    std::int32_t* entry;
    std::int32_t* dataset;
    i64* sample;
    i64* ordinal;
    i64* slot;  // of the buffer that the row is replayed from, or -1
};

// A replay row was to be drawn, but the buffer holds none that it may be.
struct BufferEmpty : std::runtime_error {
    BufferEmpty(i64 batch, i64 task)
        : std::runtime_error("the buffer holds no row to replay"), batch(batch), task(task) {}
    i64 batch, task;
};

// What the first `batches` batches took.
struct Ledger {
    // By span, and in it by dataset: rows that were its fresh ones, those of them that were
    // replayed, and fresh ones that were skipped.
    std::vector<std::vector<i64>> fresh, replayed, skipped;
    std::vector<i64> batches, replay_rows, pool_batches;  // by span
};

// Any number of threads may ask while another marks a batch as skipped.
class Plan {
  public:
    Plan(u64 seed, std::vector<u64> dataset_keys, std::vector<i64> dataset_sizes,
         BufferSpec buffer = {})
        : seed_(seed),
          dataset_keys_(std::move(dataset_keys)),
          buffer_(std::move(buffer)),
          schedule_(std::move(dataset_sizes)) {
        buffer_.check();
        if (dataset_keys_.size() != schedule_.dataset_sizes().size()) {
            throw std::invalid_argument(
                std::to_string(dataset_keys_.size()) + " dataset keys were given for " +
                std::to_string(schedule_.dataset_sizes().size()) + " datasets");
        }
        for (const i64 size : schedule_.dataset_sizes()) {
            permutations_.emplace_back(static_cast<u64>(size));
        }
    }

    void append(i64 first_batch, i64 global_batch_size, ReplaySpec replay, std::vector<i64> dropped,
                const std::vector<SpanSpec>& specs) {
        const std::unique_lock lock(mutex_);
        const bool past =
            !skipped_.intervals().empty() && skipped_.intervals().back().batch >= first_batch;
        if (past) {
            throw std::invalid_argument("a segment from batch " + std::to_string(first_batch) +
                                        " cannot follow skipped batch " +
                                        std::to_string(skipped_.intervals().back().batch));
        }
        check_buffer(replay, specs);
        schedule_.append(first_batch, global_batch_size, std::move(replay), std::move(dropped),
                         specs, skipped_);
        replayed_ = Replayed();
        held_ = Held();
    }

    i64 total_batches() const {
        const std::shared_lock lock(mutex_);
        return schedule_.total_batches();
    }

    i64 global_batch_size(i64 batch) const {
        const std::shared_lock lock(mutex_);
        return rows_of(schedule_.span_of_batch(batch));
    }

    // A copy: marks move what depends on the skipped batches.
    std::vector<Span> spans() const {
        const std::shared_lock lock(mutex_);
        return schedule_.spans();
    }

    // For each of a span's datasets, the samples that the run has taken of it when the span ends.
    // For one trained before: the samples that its place in the pool stands for.
    std::vector<i64> cursors_after(i64 span) const {
        const std::shared_lock lock(mutex_);
        if (span < 0 || span >= static_cast<i64>(schedule_.spans().size())) {
            throw std::invalid_argument("span " + std::to_string(span) +
                                        " is not one of the plan's " +
                                        std::to_string(schedule_.spans().size()));
        }
        const Span& found = schedule_.spans()[span];
        std::vector<i64> cursors = found.tree.counts(found.ordinals);
        for (std::size_t i = 0; i < cursors.size(); ++i) cursors[i] += found.cursors[i];
        return cursors;
    }

    // For each dataset, the samples that the run took of it in the batches before one.
    std::vector<i64> cursors_at(i64 batch) const {
        const std::shared_lock lock(mutex_);
        return schedule_.cursors_at(batch);
    }

    i64 fresh_rows_before(i64 batch) const {
        const std::shared_lock lock(mutex_);
        return schedule_.fresh_rows_before(batch);
    }

    i64 replay_rows(i64 batch) const {
        const std::shared_lock lock(mutex_);
        const Span& span = schedule_.span_of_batch(batch);
        return rows_of(span) - fresh_rows(span, batch);
    }

    // Places start .. stop - 1 of a batch.
    void rows(i64 batch, i64 start, i64 stop, const RowColumns& out) const {
        const std::shared_lock lock(mutex_);
        const Batch view = look_at(batch);
        if (start < 0 || start > stop || stop > rows_of(*view.span)) {
            throw std::invalid_argument("rows " + std::to_string(start) + " to " +
                                        std::to_string(stop) + " are not within a batch of " +
                                        std::to_string(rows_of(*view.span)));
        }
        std::unique_lock holding(held_mutex_, std::defer_lock);
        if (from_buffer(view)) {
            holding.lock();
            if (held_.batch() > batch) held_ = Held();
            held_.advance(world(), batch, Nobody());
        }
        const Permutation& placement = schedule_.segment_of(*view.span).placement;
        const u64 key = keyed_hash(seed_, Domain::placement, batch);
        for (i64 place = start; place < stop; ++place) {
            const i64 row = static_cast<i64>(placement.forward(key, static_cast<u64>(place)));
            const bool replay = row >= view.fresh;
            const Drawn drawn = replay ? draw(view, row - view.fresh, held_)
                                       : Drawn{view.first_ordinal + row, Reservoirs::kNone};
            const Source source = locate(drawn.ordinal);
            const i64 at = place - start;
            out.kind[at] = replay ? 1 : 0;
            out.entry[at] = static_cast<std::int32_t>(source.span);
            out.dataset[at] = static_cast<std::int32_t>(source.dataset);
            out.sample[at] = sample_of(source);
            out.ordinal[at] = drawn.ordinal;
            out.slot[at] = drawn.slot;
        }
    }

    // Lets all rows of batches before `batch` enter a buffer that stands at an earlier one, and
    // begins that batch's span. Batches that are not applied must be marked before.
    //   sink.entered(slot, live): a row took a slot (kNone: it did not); sink.emptied(slot)
    template <class Sink>
    void advance_buffer(Held& held, i64 batch, Sink&& sink) const {
        const std::shared_lock lock(mutex_);
        if (!buffer_.given()) throw std::invalid_argument("the plan has no buffer");
        if (batch < held.batch() || batch > schedule_.total_batches()) {
            throw std::invalid_argument("a buffer at batch " + std::to_string(held.batch()) +
                                        " cannot advance to batch " + std::to_string(batch) +
                                        " of " + std::to_string(schedule_.total_batches()));
        }
        held.advance(world(), batch, sink);
    }

    // Ordinal, dataset and sample of a row by its live index, as known before a batch.
    std::array<i64, 3> source_of_live(i64 live, i64 batch) const {
        const std::shared_lock lock(mutex_);
        const i64 ordinal = skipped_.ordinal_of_live(live, skipped_.count_before(batch));
        const Source source = locate(ordinal);
        return {ordinal, source.dataset, sample_of(source)};
    }

    i64 num_slots() const {
        i64 total = 0;
        for (const i64 capacity : buffer_.capacities) total += capacity;
        return total;
    }

    void mark_skipped(i64 batch) {
        const std::unique_lock lock(mutex_);
        const i64 fresh = fresh_rows(schedule_.span_of_batch(batch), batch);
        skipped_.add(batch, schedule_.first_ordinal(batch), fresh);
        schedule_.update(skipped_);
        if (batch < replayed_.batches) replayed_ = Replayed();
        if (batch < held_.batch()) held_ = Held();
    }

    std::vector<i64> skipped() const {
        const std::shared_lock lock(mutex_);
        std::vector<i64> batches;
        for (const auto& interval : skipped_.intervals()) batches.push_back(interval.batch);
        return batches;
    }

    Ledger ledger(i64 batches) {
        const std::unique_lock counting(replayed_mutex_);
        // Marks only wait for the length of one ledger; rows are read all the while.
        const std::shared_lock lock(mutex_);
        if (batches < 0 || batches > schedule_.total_batches()) {
            throw std::invalid_argument(std::to_string(batches) + " batches are not within the " +
                                        std::to_string(schedule_.total_batches()) + " of the plan");
        }
        Ledger result;
        for (const Span& span : schedule_.spans()) add_span(result, span, batches);
        for (std::size_t i = 0; i < skipped_.count_before(batches); ++i) {
            add_skipped(result, skipped_.intervals()[i]);
        }
        result.replayed = count_replayed(batches);
        return result;
    }

  private:
    struct Source {
        i64 span, leaf, dataset, k;
    };

    // What all rows of one batch share.
    struct Batch {
        const Span* span;
        i64 number;
        i64 fresh;
        i64 first_ordinal;
        i64 replayed;       // replay rows of the span in earlier batches
        i64 own;            // live rows that the span added to its pool before this batch
        std::size_t skips;  // how many skipped batches the pool leaves out
    };

    struct Replayed {
        i64 batches = 0;
        std::vector<std::vector<i64>> counts{};
        Held held{};
    };

    struct Drawn {
        i64 ordinal;
        i64 slot;  // kNone: not from the buffer
    };

    void check_buffer(const ReplaySpec& replay, const std::vector<SpanSpec>& specs) const {
        if (!replay.from_buffer) return;
        if (!buffer_.given()) throw std::invalid_argument("replay from a buffer without capacity");
        if (replay.by_task() && !buffer_.by_task) {
            throw std::invalid_argument("replay by task needs a capacity for each task");
        }
        for (const SpanSpec& spec : specs) {
            if (buffer_.group_of(spec.task) >= static_cast<i64>(buffer_.capacities.size())) {
                throw std::invalid_argument("task " + std::to_string(spec.task) +
                                            " has no capacity in the buffer");
            }
        }
    }

    HeldWorld world() const { return {seed_, buffer_, schedule_, skipped_}; }

    bool from_buffer(const Batch& view) const {
        return schedule_.segment_of(*view.span).replay.from_buffer;
    }

    i64 rows_of(const Span& span) const { return schedule_.segment_of(span).global_batch_size; }

    i64 fresh_rows(const Span& span, i64 batch) const {
        const i64 local = batch - span.first_batch;
        return schedule_.fresh_rows(span, local + 1) - schedule_.fresh_rows(span, local);
    }

    Batch look_at(i64 batch) const {
        const Span& span = schedule_.span_of_batch(batch);
        const i64 local = batch - span.first_batch;
        Batch view{};
        view.span = &span;
        view.number = batch;
        view.replayed = schedule_.replay_rows(span, local);
        view.fresh = rows_of(span) - (schedule_.replay_rows(span, local + 1) - view.replayed);
        view.first_ordinal = span.first_ordinal + rows_of(span) * local - view.replayed;
        view.skips = skipped_.count_before(span.first_batch);
        if (span.pool.takes_own()) {
            const i64 before = skipped_.total_of(view.skips);
            view.skips = skipped_.count_before(batch);
            const i64 spent = skipped_.total_of(view.skips) - before;
            view.own = view.first_ordinal - span.first_ordinal - spent;
        }
        return view;
    }

    // A uniform draw over the live ordinals of the pool, or of one of its tasks.
    i64 draw_of_pool(const Batch& view, i64 replay_row) const {
        const u64 hash = keyed_hash(seed_, Domain::replay, view.number, replay_row);
        const i64 live = view.span->pool.draw(view.replayed + replay_row, hash, view.own);
        return skipped_.ordinal_of_live(live, view.skips);
    }

    // From a buffer with a capacity for each task, the pool's draw decides the task, and a second
    // one the row of that task.
    Drawn draw(const Batch& view, i64 replay_row, const Held& held) const {
        if (!from_buffer(view)) return {draw_of_pool(view, replay_row), Reservoirs::kNone};
        i64 task = 0;
        if (buffer_.by_task) {
            const i64 span = schedule_.span_of_ordinal(draw_of_pool(view, replay_row));
            task = schedule_.spans()[span].spec.task;
        }
        const u64 hash = keyed_hash(seed_, Domain::slot, view.number, replay_row);
        const i64 slot = held.reservoirs().draw(buffer_.group_of(task), hash);
        if (slot == Reservoirs::kNone) throw BufferEmpty(view.number, task);
        const i64 live = held.reservoirs().row_in(slot);
        return {skipped_.ordinal_of_live(live, skipped_.count_before(view.number)), slot};
    }

    Source locate(i64 ordinal) const {
        const i64 index = schedule_.span_of_ordinal(ordinal);
        const Span& span = schedule_.spans()[index];
        const WeightTree::Place place = span.tree.locate(ordinal - span.first_ordinal);
        return {index, place.leaf, span.spec.datasets[place.leaf],
                span.cursors[place.leaf] + place.ordinal};
    }

    i64 sample_of(const Source& source) const {
        const i64 size = schedule_.dataset_sizes()[source.dataset];
        const i64 epoch = source.k / size;
        const u64 key =
            keyed_hash(seed_, Domain::permutation, dataset_keys_[source.dataset], epoch);
        const u64 position = static_cast<u64>(source.k - epoch * size);
        return static_cast<i64>(permutations_[source.dataset].forward(key, position));
    }

    void add_span(Ledger& ledger, const Span& span, i64 batches) const {
        const i64 count = std::min(std::max(batches - span.first_batch, i64{0}), span.batches);
        ledger.batches.push_back(count);
        ledger.replay_rows.push_back(schedule_.replay_rows(span, count));
        ledger.pool_batches.push_back(std::max(count - span.pool_start, i64{0}));
        ledger.fresh.push_back(span.tree.counts(schedule_.fresh_rows(span, count)));
        ledger.skipped.emplace_back(span.spec.datasets.size(), 0);
    }

    // Fresh rows of a skipped batch move from `fresh` to `skipped`.
    void add_skipped(Ledger& ledger, const SkippedBatches::Interval& interval) const {
        const Span& span = schedule_.span_of_batch(interval.batch);
        const std::ptrdiff_t index = &span - schedule_.spans().data();
        const i64 first = interval.first - span.first_ordinal;
        const std::vector<i64> before = span.tree.counts(first);
        const std::vector<i64> after = span.tree.counts(first + interval.length);
        for (std::size_t i = 0; i < after.size(); ++i) {
            ledger.skipped[index][i] += after[i] - before[i];
            ledger.fresh[index][i] -= after[i] - before[i];
        }
    }

    // Replay rows by the span and dataset that they repeat, without those of skipped batches. Draws
    // have no closed form, so they are counted, and a later ledger goes on from here.
    std::vector<std::vector<i64>> count_replayed(i64 batches) {
        const bool go_on = batches >= replayed_.batches;
        Replayed counted = go_on ? replayed_ : Replayed();
        if (counted.counts.empty()) {
            for (const Span& span : schedule_.spans()) {
                counted.counts.emplace_back(span.spec.datasets.size(), 0);
            }
        }
        for (; counted.batches < batches; ++counted.batches) {
            if (skipped_.run_from(counted.batches) > 0) continue;
            const Batch view = look_at(counted.batches);
            if (from_buffer(view)) counted.held.advance(world(), counted.batches, Nobody());
            for (i64 row = 0; row < rows_of(*view.span) - view.fresh; ++row) {
                const Source source = locate(draw(view, row, counted.held).ordinal);
                ++counted.counts[source.span][source.leaf];
            }
        }
        if (go_on) replayed_ = counted;
        return counted.counts;
    }

    const u64 seed_;
    const std::vector<u64> dataset_keys_;
    const BufferSpec buffer_;
    Schedule schedule_;
    std::vector<Permutation> permutations_;
    SkippedBatches skipped_;
    mutable std::shared_mutex mutex_;  // guards schedule_ and skipped_
    Replayed replayed_;                // guarded by mutex_ alone, or shared with replayed_mutex_
    std::mutex replayed_mutex_;
    mutable Held held_;  // where `rows` stands; guarded by mutex_ alone, or shared with held_mutex_
    mutable std::mutex held_mutex_;
};

}  // namespace mer
