// The entries of a stream laid out over batches and fresh ordinals.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fraction.hpp"
#include "skipped.hpp"
#include "weight_tree.hpp"

namespace mer {

// What the user asks of one entry. Exactly one of `batches` and `fresh_rows` is above 0, and
// neither if `trained_before`. No weights: each dataset by its number of samples.
struct EntrySpec {
    std::vector<i64> datasets;
    std::vector<double> weights;
    i64 batches = 0;
    i64 fresh_rows = 0;
    bool trained_before = false;
};

struct Entry {
    EntrySpec spec;
    WeightTree tree;
    i64 first_batch = 0;
    i64 batches = 0;
    i64 first_ordinal = 0;
    i64 ordinals = 0;    // fresh rows of the entry
    i64 pool_start = 0;  // batches of the entry, from its first, that find no live row to replay
    std::vector<i64> cursors{};  // samples that each of its datasets gave to earlier entries

    i64 last_batch() const { return first_batch + batches; }
};

// Fresh ordinals count every fresh row of the run. Those of entries trained before the run come
// first, wherever the entries stand, so that they are in the pool from batch 0.
class Schedule {
  public:
    Schedule(i64 global_batch_size, Fraction alpha, bool include_current_task,
             std::vector<i64> dataset_sizes, const std::vector<EntrySpec>& specs)
        : global_batch_size_(global_batch_size),
          alpha_(alpha),
          include_current_task_(include_current_task),
          dataset_sizes_(std::move(dataset_sizes)) {
        alpha_.check();
        require(global_batch_size_ >= 1, "global_batch_size", global_batch_size_, "at least 1");
        for (const i64 size : dataset_sizes_) {
            require(size >= 1 && size <= kLimit, "a dataset's samples", size, "from 1 to 2^62");
        }
        for (const EntrySpec& spec : specs) entries_.push_back(make_entry(spec));
        lay_out(SkippedBatches(), true);
    }

    i64 global_batch_size() const { return global_batch_size_; }
    bool include_current_task() const { return include_current_task_; }
    const std::vector<i64>& dataset_sizes() const { return dataset_sizes_; }
    const std::vector<Entry>& entries() const { return entries_; }
    i64 total_batches() const { return total_batches_; }

    // Moves what depends on the skipped batches: where the pools begin, and what follows from it.
    void update(const SkippedBatches& skipped) { lay_out(skipped, false); }

    // The trained entry that holds a batch.
    const Entry& entry_of_batch(i64 batch) const {
        if (batch < 0 || batch >= total_batches_) {
            throw std::invalid_argument("batch " + std::to_string(batch) +
                                        " is outside of the plan's " +
                                        std::to_string(total_batches_) + " batches");
        }
        return entries_[last_not_above(trained_, batch, &Entry::first_batch)];
    }

    i64 entry_of_ordinal(i64 ordinal) const {
        return last_not_above(by_ordinal_, ordinal, &Entry::first_ordinal);
    }

    // Replay rows in the first `count` batches of an entry: floor(alpha N t), less those of the
    // batches before there was anything to replay.
    i64 replay_rows(const Entry& entry, i64 count) const {
        const i64 idle = std::min(count, entry.pool_start);
        return alpha_.floor_of(global_batch_size_ * count) -
               alpha_.floor_of(global_batch_size_ * idle);
    }

    i64 fresh_rows(const Entry& entry, i64 count) const {
        return global_batch_size_ * count - replay_rows(entry, count);
    }

    // The first fresh ordinal of a batch; total_batches() gives the end of all ordinals.
    i64 ordinal_at(i64 batch) const {
        if (batch == total_batches_) return total_ordinals_;
        const Entry& entry = entry_of_batch(batch);
        return entry.first_ordinal + fresh_rows(entry, batch - entry.first_batch);
    }

  private:
    static constexpr i64 kLimit = static_cast<i64>(1) << 62;

    static void require(bool holds, const char* what, i64 given, const char* allowed) {
        if (!holds) {
            throw std::invalid_argument(std::string(what) + " must be " + allowed + ", not " +
                                        std::to_string(given));
        }
    }

    static i64 checked_sum(i64 total, i64 more) {
        i64 sum = 0;
        if (__builtin_add_overflow(total, more, &sum) || sum > kLimit) {
            throw std::invalid_argument("a plan holds at most 2^62 rows and 2^62 samples, not " +
                                        std::to_string(total) + " + " + std::to_string(more));
        }
        return sum;
    }

    i64 last_not_above(const std::vector<i64>& indices, i64 value, i64 Entry::* key) const {
        const auto after =
            std::upper_bound(indices.begin(), indices.end(), value,
                             [&](i64 wanted, i64 index) { return wanted < entries_[index].*key; });
        return *(after - 1);
    }

    Entry make_entry(const EntrySpec& spec) const {
        std::vector<i64> sizes;
        i64 samples = 0;
        for (const i64 dataset : spec.datasets) {
            require(dataset >= 0 && dataset < static_cast<i64>(dataset_sizes_.size()), "a dataset",
                    dataset, "an index into the datasets");
            sizes.push_back(dataset_sizes_[dataset]);
            samples = checked_sum(samples, sizes.back());
        }
        if (!spec.weights.empty() && spec.weights.size() != spec.datasets.size()) {
            throw std::invalid_argument("an entry of " + std::to_string(spec.datasets.size()) +
                                        " datasets was given " +
                                        std::to_string(spec.weights.size()) + " weights");
        }
        require(spec.batches >= 0, "an entry's batches", spec.batches, "at least 0");
        require(spec.fresh_rows >= 0, "an entry's fresh rows", spec.fresh_rows, "at least 0");
        const int lengths = (spec.batches > 0) + (spec.fresh_rows > 0);
        require(lengths == (spec.trained_before ? 0 : 1), "the number of lengths", lengths,
                "1 for an entry to train and 0 for one trained before");
        Entry entry{spec, spec.weights.empty() ? WeightTree::from_sizes(sizes)
                                               : WeightTree::from_weights(spec.weights)};
        entry.ordinals = spec.trained_before ? samples : 0;
        entry.cursors.assign(sizes.size(), 0);
        return entry;
    }

    // The smallest number of batches with `wanted` fresh rows: with replay, more of them.
    i64 batches_for(const Entry& entry, i64 wanted) const {
        i64 low = 0, high = 1;  // fresh_rows(low) < wanted <= fresh_rows(high)
        for (;; high *= 2) {
            checked_rows(high);
            if (fresh_rows(entry, high) >= wanted) break;
        }
        while (high - low > 1) {
            const i64 middle = low + (high - low) / 2;
            (fresh_rows(entry, middle) < wanted ? low : high) = middle;
        }
        return high;
    }

    void checked_rows(i64 batches) const {
        i64 rows = 0;
        if (__builtin_mul_overflow(batches, global_batch_size_, &rows) || rows > kLimit) {
            throw std::invalid_argument("a plan holds at most 2^62 rows, not " +
                                        std::to_string(batches) + " batches of " +
                                        std::to_string(global_batch_size_));
        }
    }

    void lay_out(const SkippedBatches& skipped, bool first_time) {
        trained_.clear();
        by_ordinal_.clear();
        total_batches_ = total_ordinals_ = 0;
        for (i64 index = 0; index < static_cast<i64>(entries_.size()); ++index) {
            Entry& entry = entries_[index];
            if (entry.spec.trained_before) place_ordinals(entry, index);
        }
        std::vector<i64> cursors(dataset_sizes_.size(), 0);
        for (i64 index = 0; index < static_cast<i64>(entries_.size()); ++index) {
            Entry& entry = entries_[index];
            entry.first_batch = total_batches_;
            if (entry.spec.trained_before) continue;
            place_pool(entry, skipped);
            if (first_time) set_length(entry);
            entry.pool_start = std::min(entry.pool_start, entry.batches);
            entry.ordinals = fresh_rows(entry, entry.batches);
            total_batches_ = checked_sum(total_batches_, entry.batches);
            checked_rows(total_batches_);
            trained_.push_back(index);
            place_ordinals(entry, index);
            move_cursors(entry, cursors);
        }
    }

    void place_ordinals(Entry& entry, i64 index) {
        entry.first_ordinal = total_ordinals_;
        total_ordinals_ = checked_sum(total_ordinals_, entry.ordinals);
        // Without ordinals (a short entry of replay rows only) nothing is ever looked up there.
        if (entry.ordinals > 0) by_ordinal_.push_back(index);
    }

    void place_pool(Entry& entry, const SkippedBatches& skipped) const {
        const i64 spent = skipped.total_of(skipped.count_before(entry.first_batch));
        const i64 live = total_ordinals_ - spent;
        if (alpha_.numerator == 0 || (live == 0 && !include_current_task_)) {
            entry.pool_start = kLimit;  // never
        } else {
            entry.pool_start = live > 0 ? 0 : 1 + skipped.run_from(entry.first_batch);
        }
    }

    void set_length(Entry& entry) const {
        entry.batches =
            entry.spec.batches > 0 ? entry.spec.batches : batches_for(entry, entry.spec.fresh_rows);
        checked_rows(entry.batches);
    }

    // A dataset that an earlier entry began goes on where that entry left it.
    static void move_cursors(Entry& entry, std::vector<i64>& cursors) {
        const std::vector<i64> counts = entry.tree.counts(entry.ordinals);
        for (std::size_t i = 0; i < counts.size(); ++i) {
            i64& cursor = cursors[entry.spec.datasets[i]];
            entry.cursors[i] = cursor;
            cursor += counts[i];
        }
    }

    i64 global_batch_size_;
    Fraction alpha_;
    bool include_current_task_;
    std::vector<i64> dataset_sizes_;
    std::vector<Entry> entries_;
    std::vector<i64> trained_;     // indices of entries that train, by batch
    std::vector<i64> by_ordinal_;  // indices of entries with fresh rows, by ordinal
    i64 total_batches_ = 0;
    i64 total_ordinals_ = 0;
};

}  // namespace mer
