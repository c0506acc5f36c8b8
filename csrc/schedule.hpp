// The spans of a run laid out over batches and fresh ordinals.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "permutation.hpp"
#include "pool.hpp"
#include "skipped.hpp"
#include "weight_tree.hpp"

namespace mer {

// What one segment asks of one entry of the stream. Exactly one of `batches` and `fresh_rows` is
// above 0, and neither if `trained_before`. No weights: each dataset by its number of samples.
struct SpanSpec {
    i64 position = 0;  // of the entry in the stream; the spans of one entry share it
    i64 task = 0;
    std::vector<i64> datasets;
    std::vector<double> weights;
    i64 batches = 0;
    i64 fresh_rows = 0;
    bool trained_before = false;
};

// From `first_batch` on, up to the next segment's.
struct Segment {
    i64 first_batch;
    i64 global_batch_size;
    ReplaySpec replay;
    Permutation placement;     // of the rows of a batch
    std::vector<i64> dropped;  // tasks whose rows of earlier segments are never replayed again
};

// The part of an entry that one segment trains.
struct Span {
    SpanSpec spec;
    i64 segment;
    WeightTree tree;
    bool sized = false;  // whether its length was decided
    i64 first_batch = 0;
    i64 batches = 0;
    i64 first_ordinal = 0;
    i64 ordinals = 0;     // fresh rows of the span
    i64 first_fresh = 0;  // fresh rows of the run before it, without those trained before
    i64 pool_start = 0;   // batches of the span, from its first, that find no live row to replay
    Pool pool{};
    std::vector<i64> cursors{};  // samples that each of its datasets gave to earlier spans

    i64 last_batch() const { return first_batch + batches; }
};

// Fresh ordinals count every fresh row of the run and never change. Rows trained before take
// theirs when the segment that brings them begins, so that they are in the pool from there on.
class Schedule {
  public:
    explicit Schedule(std::vector<i64> dataset_sizes) : dataset_sizes_(std::move(dataset_sizes)) {
        for (const i64 size : dataset_sizes_) {
            require(size >= 1 && size <= kLimit, "a dataset's samples", size, "from 1 to 2^62");
        }
    }

    // Ends what was planned at `first_batch` and goes on with the spans of a new segment.
    void append(i64 first_batch, i64 global_batch_size, ReplaySpec replay, std::vector<i64> dropped,
                const std::vector<SpanSpec>& specs, const SkippedBatches& skipped) {
        replay.alpha.check();
        require(global_batch_size >= 1, "global_batch_size", global_batch_size, "at least 1");
        const bool inside = segments_.empty() ? first_batch == 0
                                              : first_batch >= segments_.back().first_batch &&
                                                    first_batch <= total_batches_;
        require(inside, "a segment's first batch", first_batch,
                "0 for the first, and within what was planned for a later one");
        if (replay.by_task()) {
            for (const SpanSpec& spec : specs) check_task(replay, spec.task);
            for (const Span& span : spans_) check_task(replay, span.spec.task);
        }
        cut(first_batch);
        segments_.push_back({first_batch, global_batch_size, std::move(replay),
                             Permutation(static_cast<u64>(global_batch_size)), std::move(dropped)});
        for (const SpanSpec& spec : specs) spans_.push_back(make_span(spec));
        lay_out(skipped);
    }

    const std::vector<i64>& dataset_sizes() const { return dataset_sizes_; }
    const std::vector<Span>& spans() const { return spans_; }
    i64 total_batches() const { return total_batches_; }
    const Segment& segment_of(const Span& span) const { return segments_[span.segment]; }
    const std::vector<Segment>& segments() const { return segments_; }

    // Whether a span's rows were dropped when a segment began, that one or one before it.
    bool is_dropped(const Span& span, i64 segment) const {
        for (i64 later = span.segment + 1; later <= segment; ++later) {
            const std::vector<i64>& gone = segments_[later].dropped;
            if (std::find(gone.begin(), gone.end(), span.spec.task) != gone.end()) return true;
        }
        return false;
    }

    // Ordinals that skipped batches spent before a span: none of its own segment for one trained
    // before, whose ordinals come first there.
    i64 spent_before(const Span& span, const SkippedBatches& skipped) const {
        const i64 batch =
            span.spec.trained_before ? segment_of(span).first_batch : span.first_batch;
        return skipped.total_of(skipped.count_before(batch));
    }

    // Moves what depends on the skipped batches: pools, where they begin, what follows from it.
    void update(const SkippedBatches& skipped) { lay_out(skipped); }

    // The trained span that holds a batch.
    const Span& span_of_batch(i64 batch) const {
        if (batch < 0 || batch >= total_batches_) {
            throw std::invalid_argument("batch " + std::to_string(batch) +
                                        " is outside of the plan's " +
                                        std::to_string(total_batches_) + " batches");
        }
        return spans_[last_not_above(trained_, batch, &Span::first_batch)];
    }

    i64 span_of_ordinal(i64 ordinal) const {
        return last_not_above(by_ordinal_, ordinal, &Span::first_ordinal);
    }

    // Replay rows in the first `count` batches of a span: floor(alpha N t), less those of the
    // batches before there was anything to replay.
    i64 replay_rows(const Span& span, i64 count) const {
        const Segment& segment = segment_of(span);
        const i64 idle = std::min(count, span.pool_start);
        return segment.replay.alpha.floor_of(segment.global_batch_size * count) -
               segment.replay.alpha.floor_of(segment.global_batch_size * idle);
    }

    i64 fresh_rows(const Span& span, i64 count) const {
        return segment_of(span).global_batch_size * count - replay_rows(span, count);
    }

    i64 first_ordinal(i64 batch) const {
        const Span& span = span_of_batch(batch);
        return span.first_ordinal + fresh_rows(span, batch - span.first_batch);
    }

    // Fresh rows that the run trained in earlier batches; total_batches() gives all of them.
    i64 fresh_rows_before(i64 batch) const {
        if (batch == total_batches_) return total_fresh_;
        const Span& span = span_of_batch(batch);
        return span.first_fresh + fresh_rows(span, batch - span.first_batch);
    }

    // Samples that each dataset gave to the batches before one.
    std::vector<i64> cursors_at(i64 batch) const {
        std::vector<i64> cursors(dataset_sizes_.size(), 0);
        for (const i64 index : trained_) {
            const Span& span = spans_[index];
            const i64 count = std::min(batch - span.first_batch, span.batches);
            if (count <= 0) break;
            const std::vector<i64> counts = span.tree.counts(fresh_rows(span, count));
            for (std::size_t i = 0; i < counts.size(); ++i) {
                cursors[span.spec.datasets[i]] += counts[i];
            }
        }
        return cursors;
    }

  private:
    static constexpr i64 kLimit = static_cast<i64>(1) << 62;

    static void require(bool holds, const char* what, i64 given, const char* allowed) {
        if (!holds) {
            throw std::invalid_argument(std::string(what) + " must be " + allowed + ", not " +
                                        std::to_string(given));
        }
    }

    static void check_task(const ReplaySpec& replay, i64 task) {
        require(task >= 0 && task < static_cast<i64>(replay.task_weights.size()), "a task", task,
                "an index into the replay weights");
    }

    static i64 checked_sum(i64 total, i64 more) {
        i64 sum = 0;
        if (__builtin_add_overflow(total, more, &sum) || sum > kLimit) {
            throw std::invalid_argument("a plan holds at most 2^62 rows and 2^62 samples, not " +
                                        std::to_string(total) + " + " + std::to_string(more));
        }
        return sum;
    }

    static i64 checked_rows(i64 batches, i64 global_batch_size) {
        i64 rows = 0;
        if (batches < 0 || __builtin_mul_overflow(batches, global_batch_size, &rows) ||
            rows > kLimit) {
            throw std::invalid_argument("a plan holds at most 2^62 rows, not " +
                                        std::to_string(batches) + " batches of " +
                                        std::to_string(global_batch_size));
        }
        return rows;
    }

    i64 last_not_above(const std::vector<i64>& indices, i64 value, i64 Span::* key) const {
        const auto after =
            std::upper_bound(indices.begin(), indices.end(), value,
                             [&](i64 wanted, i64 index) { return wanted < spans_[index].*key; });
        return *(after - 1);
    }

    Span make_span(const SpanSpec& spec) const {
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
        Span span{spec, static_cast<i64>(segments_.size()) - 1,
                  spec.weights.empty() ? WeightTree::from_sizes(sizes)
                                       : WeightTree::from_weights(spec.weights)};
        span.ordinals = spec.trained_before ? samples : 0;
        span.cursors.assign(sizes.size(), 0);
        return span;
    }

    // Spans keep what lies before `batch`; those that would have begun later are gone.
    void cut(i64 batch) {
        for (Span& span : spans_) {
            span.batches = std::min(span.batches, std::max(batch - span.first_batch, i64{0}));
        }
        const auto idle = [](const Span& span) {
            return !span.spec.trained_before && span.batches == 0;
        };
        spans_.erase(std::remove_if(spans_.begin(), spans_.end(), idle), spans_.end());
    }

    // The smallest number of batches with `wanted` fresh rows: with replay, more of them.
    i64 batches_for(const Span& span, i64 wanted) const {
        i64 low = 0, high = 1;  // fresh_rows(low) < wanted <= fresh_rows(high)
        for (;; high *= 2) {
            checked_rows(high, segment_of(span).global_batch_size);
            if (fresh_rows(span, high) >= wanted) break;
        }
        while (high - low > 1) {
            const i64 middle = low + (high - low) / 2;
            (fresh_rows(span, middle) < wanted ? low : high) = middle;
        }
        return high;
    }

    void lay_out(const SkippedBatches& skipped) {
        trained_.clear();
        by_ordinal_.clear();
        total_batches_ = total_ordinals_ = total_rows_ = total_fresh_ = 0;
        std::vector<i64> cursors(dataset_sizes_.size(), 0);
        for (auto first = spans_.begin(); first != spans_.end();) {
            const auto later = [&](const Span& span) { return span.segment != first->segment; };
            const auto end = std::find_if(first, spans_.end(), later);
            lay_out_segment(first - spans_.begin(), end - spans_.begin(), skipped, cursors);
            first = end;
        }
    }

    void lay_out_segment(i64 first, i64 end, const SkippedBatches& skipped,
                         std::vector<i64>& cursors) {
        for (i64 index = first; index < end; ++index) {
            if (spans_[index].spec.trained_before) place_ordinals(index);
        }
        for (i64 index = first; index < end; ++index) {
            Span& span = spans_[index];
            span.first_batch = total_batches_;
            if (span.spec.trained_before) continue;
            place_pool(span, skipped);
            if (!span.sized) set_length(span);
            span.pool_start = std::min(span.pool_start, span.batches);
            span.ordinals = fresh_rows(span, span.batches);
            total_batches_ = checked_sum(total_batches_, span.batches);
            total_rows_ = checked_sum(
                total_rows_, checked_rows(span.batches, segment_of(span).global_batch_size));
            trained_.push_back(index);
            span.first_fresh = total_fresh_;
            total_fresh_ += span.ordinals;
            place_ordinals(index);
            move_cursors(span, cursors);
        }
    }

    void place_ordinals(i64 index) {
        Span& span = spans_[index];
        span.first_ordinal = total_ordinals_;
        total_ordinals_ = checked_sum(total_ordinals_, span.ordinals);
        // Without ordinals (a short span of replay rows only) nothing is ever looked up there.
        if (span.ordinals > 0) by_ordinal_.push_back(index);
    }

    void place_pool(Span& span, const SkippedBatches& skipped) const {
        const ReplaySpec& replay = segment_of(span).replay;
        const i64 own_start = total_ordinals_ - spent_before(span, skipped);
        span.pool = Pool(replay, span.spec.task, own_start);
        for (const i64 index : by_ordinal_) {
            const Span& one = spans_[index];
            const bool same = one.spec.position == span.spec.position && !one.spec.trained_before;
            if (same && !replay.include_current_task) continue;
            if (is_dropped(one, span.segment)) continue;
            const i64 before = spent_before(one, skipped);
            const i64 after = one.spec.trained_before
                                  ? before
                                  : skipped.total_of(skipped.count_before(one.last_batch()));
            span.pool.add(one.spec.task, one.first_ordinal - before,
                          one.ordinals - (after - before));
        }
        span.pool.close();
        if (replay.alpha.numerator == 0 || (span.pool.empty() && !span.pool.takes_own())) {
            span.pool_start = kLimit;  // never
        } else {
            span.pool_start = span.pool.empty() ? 1 + skipped.run_from(span.first_batch) : 0;
        }
    }

    void set_length(Span& span) const {
        span.batches =
            span.spec.batches > 0 ? span.spec.batches : batches_for(span, span.spec.fresh_rows);
        checked_rows(span.batches, segment_of(span).global_batch_size);
        span.sized = true;
    }

    // A dataset that an earlier span began goes on where that span left it.
    static void move_cursors(Span& span, std::vector<i64>& cursors) {
        const std::vector<i64> counts = span.tree.counts(span.ordinals);
        for (std::size_t i = 0; i < counts.size(); ++i) {
            i64& cursor = cursors[span.spec.datasets[i]];
            span.cursors[i] = cursor;
            cursor += counts[i];
        }
    }

    std::vector<i64> dataset_sizes_;
    std::vector<Segment> segments_;
    std::vector<Span> spans_;
    std::vector<i64> trained_;     // indices of spans that train, by batch
    std::vector<i64> by_ordinal_;  // indices of spans with fresh rows, by ordinal
    i64 total_batches_ = 0;
    i64 total_ordinals_ = 0;
    i64 total_rows_ = 0;
    i64 total_fresh_ = 0;
};

}  // namespace mer
