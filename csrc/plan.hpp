// The plan: (batch, place) -> (kind, entry, dataset, sample), without an index in memory.
#pragma once

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hash.hpp"
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
};

// What the first `batches` batches took, for each dataset and for each entry.
struct Ledger {
    std::vector<i64> fresh, replayed, skipped;   // by dataset
    std::vector<i64> replay_rows, pool_batches;  // by entry
};

// Any number of threads may ask while another marks a batch as skipped.
class Plan {
  public:
    Plan(u64 seed, i64 global_batch_size, Fraction alpha, bool include_current_task,
         std::vector<u64> dataset_keys, std::vector<i64> dataset_sizes,
         const std::vector<EntrySpec>& entries)
        : seed_(seed),
          dataset_keys_(std::move(dataset_keys)),
          schedule_(global_batch_size, alpha, include_current_task, std::move(dataset_sizes),
                    entries),
          total_batches_(schedule_.total_batches()),
          placement_(static_cast<u64>(global_batch_size)) {
        if (dataset_keys_.size() != schedule_.dataset_sizes().size()) {
            throw std::invalid_argument(
                std::to_string(dataset_keys_.size()) + " dataset keys were given for " +
                std::to_string(schedule_.dataset_sizes().size()) + " datasets");
        }
        for (const i64 size : schedule_.dataset_sizes()) {
            permutations_.emplace_back(static_cast<u64>(size));
        }
    }

    i64 global_batch_size() const { return schedule_.global_batch_size(); }
    i64 total_batches() const { return total_batches_; }
    i64 num_datasets() const { return static_cast<i64>(permutations_.size()); }

    i64 num_entries() const { return static_cast<i64>(schedule_.entries().size()); }

    // First batch and end of an entry; both the same for one trained before.
    std::pair<i64, i64> span(i64 entry) const {
        const std::shared_lock lock(mutex_);
        const Entry& found = entry_at(entry);
        return {found.first_batch, found.last_batch()};
    }

    // For each of an entry's datasets, the samples that the run has taken of it when the entry
    // ends. For one trained before: the samples that its place in the pool stands for.
    std::vector<i64> cursors_after(i64 entry) const {
        const std::shared_lock lock(mutex_);
        const Entry& found = entry_at(entry);
        std::vector<i64> cursors = found.tree.counts(found.ordinals);
        for (std::size_t i = 0; i < cursors.size(); ++i) cursors[i] += found.cursors[i];
        return cursors;
    }

    i64 ordinal_at(i64 batch) const {
        const std::shared_lock lock(mutex_);
        return schedule_.ordinal_at(batch);
    }

    i64 replay_rows(i64 batch) const {
        const std::shared_lock lock(mutex_);
        return global_batch_size() - fresh_rows(schedule_.entry_of_batch(batch), batch);
    }

    // Places start .. stop - 1 of a batch.
    void rows(i64 batch, i64 start, i64 stop, const RowColumns& out) const {
        if (start < 0 || start > stop || stop > global_batch_size()) {
            throw std::invalid_argument("rows " + std::to_string(start) + " to " +
                                        std::to_string(stop) + " are not within a batch of " +
                                        std::to_string(global_batch_size()));
        }
        const std::shared_lock lock(mutex_);
        const Batch view = look_at(batch);
        const u64 key = keyed_hash(seed_, Domain::placement, batch);
        for (i64 place = start; place < stop; ++place) {
            const i64 row = static_cast<i64>(placement_.forward(key, static_cast<u64>(place)));
            const bool replay = row >= view.fresh;
            const i64 ordinal = replay ? draw(view, row - view.fresh) : view.first_ordinal + row;
            const Source source = locate(ordinal);
            const i64 at = place - start;
            out.kind[at] = replay ? 1 : 0;
            out.entry[at] = static_cast<std::int32_t>(source.entry);
            out.dataset[at] = static_cast<std::int32_t>(source.dataset);
            out.sample[at] = sample_of(source);
            out.ordinal[at] = ordinal;
        }
    }

    void mark_skipped(i64 batch) {
        const std::unique_lock lock(mutex_);
        const i64 fresh = fresh_rows(schedule_.entry_of_batch(batch), batch);
        skipped_.add(batch, schedule_.ordinal_at(batch), fresh);
        schedule_.update(skipped_);
        if (batch < replayed_.batches) replayed_ = Replayed();
    }

    std::vector<i64> skipped() const {
        const std::shared_lock lock(mutex_);
        std::vector<i64> batches;
        for (const auto& interval : skipped_.intervals()) batches.push_back(interval.batch);
        return batches;
    }

    Ledger ledger(i64 batches) {
        check_batches(batches);
        const std::unique_lock counting(replayed_mutex_);
        // Marks only wait for the length of one ledger; rows are read all the while.
        const std::shared_lock lock(mutex_);
        Ledger result;
        result.fresh.assign(permutations_.size(), 0);
        result.skipped = result.fresh;
        for (const Entry& entry : schedule_.entries()) add_entry(result, entry, batches);
        for (std::size_t i = 0; i < skipped_.count_before(batches); ++i) {
            add_skipped(result, skipped_.intervals()[i]);
        }
        result.replayed = count_replayed(batches);
        return result;
    }

  private:
    struct Source {
        i64 entry, dataset, k;
    };

    // What all rows of one batch share.
    struct Batch {
        i64 number;
        i64 fresh;
        i64 first_ordinal;
        std::size_t skips;  // how many skipped batches the pool leaves out
        i64 live;           // ordinals in the pool
    };

    struct Replayed {
        i64 batches = 0;
        std::vector<i64> counts;
    };

    const Entry& entry_at(i64 index) const {
        if (index < 0 || index >= num_entries()) {
            throw std::invalid_argument("entry " + std::to_string(index) +
                                        " is not one of the plan's " +
                                        std::to_string(num_entries()));
        }
        return schedule_.entries()[index];
    }

    void check_batches(i64 batches) const {
        if (batches < 0 || batches > total_batches()) {
            throw std::invalid_argument(std::to_string(batches) + " batches are not within the " +
                                        std::to_string(total_batches()) + " of the plan");
        }
    }

    i64 fresh_rows(const Entry& entry, i64 batch) const {
        const i64 local = batch - entry.first_batch;
        return schedule_.fresh_rows(entry, local + 1) - schedule_.fresh_rows(entry, local);
    }

    Batch look_at(i64 batch) const {
        const Entry& entry = schedule_.entry_of_batch(batch);
        const bool current = schedule_.include_current_task();
        Batch view{};
        view.number = batch;
        view.fresh = fresh_rows(entry, batch);
        view.first_ordinal = schedule_.ordinal_at(batch);
        view.skips = skipped_.count_before(current ? batch : entry.first_batch);
        view.live =
            (current ? view.first_ordinal : entry.first_ordinal) - skipped_.total_of(view.skips);
        return view;
    }

    // A uniform draw over the live ordinals before the batch.
    i64 draw(const Batch& view, i64 replay_row) const {
        const u64 hash = keyed_hash(seed_, Domain::replay, view.number, replay_row);
        const i64 live = static_cast<i64>(scale_to(hash, static_cast<u64>(view.live)));
        return skipped_.ordinal_of_live(live, view.skips);
    }

    Source locate(i64 ordinal) const {
        const i64 index = schedule_.entry_of_ordinal(ordinal);
        const Entry& entry = schedule_.entries()[index];
        const WeightTree::Place place = entry.tree.locate(ordinal - entry.first_ordinal);
        return {index, entry.spec.datasets[place.leaf], entry.cursors[place.leaf] + place.ordinal};
    }

    i64 sample_of(const Source& source) const {
        const i64 size = schedule_.dataset_sizes()[source.dataset];
        const i64 epoch = source.k / size;
        const u64 key =
            keyed_hash(seed_, Domain::permutation, dataset_keys_[source.dataset], epoch);
        const u64 position = static_cast<u64>(source.k - epoch * size);
        return static_cast<i64>(permutations_[source.dataset].forward(key, position));
    }

    void add_entry(Ledger& ledger, const Entry& entry, i64 batches) const {
        const i64 count =
            std::min(std::max(batches - entry.first_batch, static_cast<i64>(0)), entry.batches);
        ledger.replay_rows.push_back(schedule_.replay_rows(entry, count));
        ledger.pool_batches.push_back(std::max(count - entry.pool_start, static_cast<i64>(0)));
        if (count == 0) return;
        const std::vector<i64> taken = entry.tree.counts(schedule_.fresh_rows(entry, count));
        for (std::size_t i = 0; i < taken.size(); ++i) {
            ledger.fresh[entry.spec.datasets[i]] += taken[i];
        }
    }

    // Fresh rows of a skipped batch move from `fresh` to `skipped`.
    void add_skipped(Ledger& ledger, const SkippedBatches::Interval& interval) const {
        const Entry& entry = schedule_.entry_of_batch(interval.batch);
        const i64 first = interval.first - entry.first_ordinal;
        const std::vector<i64> before = entry.tree.counts(first);
        const std::vector<i64> after = entry.tree.counts(first + interval.length);
        for (std::size_t i = 0; i < after.size(); ++i) {
            const i64 dataset = entry.spec.datasets[i];
            ledger.skipped[dataset] += after[i] - before[i];
            ledger.fresh[dataset] -= after[i] - before[i];
        }
    }

    // Replay rows by dataset, without those of skipped batches. Draws have no closed form, so they
    // are counted, and a later ledger goes on from here.
    std::vector<i64> count_replayed(i64 batches) {
        const bool go_on = batches >= replayed_.batches;
        Replayed counted = go_on ? replayed_ : Replayed();
        counted.counts.resize(permutations_.size(), 0);
        for (; counted.batches < batches; ++counted.batches) {
            if (skipped_.run_from(counted.batches) > 0) continue;
            const Batch view = look_at(counted.batches);
            for (i64 row = 0; row < global_batch_size() - view.fresh; ++row) {
                ++counted.counts[locate(draw(view, row)).dataset];
            }
        }
        if (go_on) replayed_ = counted;
        return counted.counts;
    }

    const u64 seed_;
    const std::vector<u64> dataset_keys_;
    Schedule schedule_;
    const i64 total_batches_;
    const Permutation placement_;
    std::vector<Permutation> permutations_;
    SkippedBatches skipped_;
    mutable std::shared_mutex mutex_;  // guards schedule_ and skipped_
    Replayed replayed_;                // guarded by mutex_ alone, or shared with replayed_mutex_
    std::mutex replayed_mutex_;
};

}  // namespace mer
