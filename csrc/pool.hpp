// What a replay row may be drawn from: live ordinals, together or by task.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fraction.hpp"
#include "weight_tree.hpp"

namespace mer {

// How a segment replays. No task weights: every live row of the pool is equally likely. With them
// (one a task, 0: never) the replay rows of a span are apportioned to the tasks in the pool.
struct ReplaySpec {
    Fraction alpha;
    bool include_current_task = false;
    std::vector<double> task_weights;
    bool from_buffer = false;  // rows that a buffer holds, not any that was consumed

    bool by_task() const { return !task_weights.empty(); }
    bool may_replay(i64 task) const { return !by_task() || task_weights[task] > 0; }
};

// The pool of one span when it begins. Places in it are *live indices*: the n-th fresh row of the
// run that was not skipped. What the span itself adds to its pool, batch by batch, is `current`
// rows from the live index `own_start` on; they only count with `include_current_task`.
class Pool {
  public:
    Pool() = default;
    Pool(const ReplaySpec& replay, i64 task, i64 own_start) : own_start_(own_start) {
        if (replay.by_task()) weights_ = replay.task_weights;
        if (replay.include_current_task && replay.may_replay(task)) own_group_ = group_of(task);
    }

    // Adds the live rows [first, first + length) of a task; calls come in increasing order.
    void add(i64 task, i64 first, i64 length) {
        if (length == 0 || (!weights_.empty() && weights_[task] <= 0)) return;
        Group& group = groups_[group_of(task)];
        if (!group.ranges.empty() &&
            group.ranges.back().first + group.ranges.back().length() == first) {
            group.ranges.back().end += length;
        } else {
            group.ranges.push_back({first, group.live, group.live});
            group.ranges.back().end += length;
        }
        group.live += length;
    }

    // After the last `add`: apportions rows to the tasks that are there.
    void close() {
        for (i64 at = 0; at < static_cast<i64>(groups_.size()); ++at) {
            if (groups_[at].live > 0) past_.leaves.push_back(at);
            if (groups_[at].live > 0 || at == own_group_) with_own_.leaves.push_back(at);
        }
        if (weights_.empty()) return;
        past_.grow(groups_, weights_);
        with_own_.grow(groups_, weights_);
    }

    bool empty() const { return past_.leaves.empty(); }
    bool takes_own() const { return own_group_ >= 0; }

    // The live index of a replay row.
    //   nth: which of the span's replay rows it is; decides the task
    //   hash: uniform 64 bits
    //   own: live rows that the span added before this batch
    i64 draw(i64 nth, u64 hash, i64 own) const {
        if (own_group_ < 0) own = 0;
        const Share& share = own > 0 ? with_own_ : past_;
        const i64 at =
            share.tree ? share.leaves[share.tree->locate(nth).leaf] : share.leaves.front();
        const Group& group = groups_[at];
        const i64 size = group.live + (at == own_group_ ? own : 0);
        const i64 index = static_cast<i64>(scale_to(hash, static_cast<u64>(size)));
        return index < group.live ? group.at(index) : own_start_ + (index - group.live);
    }

  private:
    struct Range {
        i64 first;   // live index
        i64 before;  // rows of the group in earlier ranges
        i64 end;     // before + length

        i64 length() const { return end - before; }
    };

    struct Group {
        i64 task;
        i64 live = 0;
        std::vector<Range> ranges{};

        i64 at(i64 index) const {
            const auto found = ranges.size() == 1
                                   ? ranges.begin()
                                   : std::upper_bound(ranges.begin(), ranges.end(), index,
                                                      [](i64 wanted, const Range& range) {
                                                          return wanted < range.end;
                                                      });
            return found->first + (index - found->before);
        }
    };

    // Which groups take part, and by which shares; a single one needs no tree.
    struct Share {
        std::vector<i64> leaves{};
        std::optional<WeightTree> tree{};

        void grow(const std::vector<Group>& groups, const std::vector<double>& weights) {
            if (leaves.size() < 2) return;
            std::vector<double> chosen;
            for (const i64 at : leaves) chosen.push_back(weights[groups[at].task]);
            tree = WeightTree::from_weights(chosen);
        }
    };

    // Groups stand in the order of their tasks; without weights all tasks are one.
    i64 group_of(i64 task) {
        if (weights_.empty()) task = 0;
        auto found = std::lower_bound(groups_.begin(), groups_.end(), task,
                                      [](const Group& one, i64 value) { return one.task < value; });
        if (found == groups_.end() || found->task != task) {
            if (own_group_ >= found - groups_.begin()) ++own_group_;
            found = groups_.insert(found, Group{task});
        }
        return found - groups_.begin();
    }

    std::vector<double> weights_;
    std::vector<Group> groups_;
    Share past_, with_own_;
    i64 own_group_ = -1;
    i64 own_start_ = 0;
};

}  // namespace mer
