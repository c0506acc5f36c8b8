// Apportions a sequence of samples to weighted datasets in closed form.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "hash.hpp"

namespace mer {

// A Huffman tree over the weights. At a node whose left side holds the share p, the left side gets
// round(p n) of the node's first n samples and the right side the rest. Both grow by 0 or 1 with n,
// so the samples of every dataset are 0, 1, 2, ... without holes, and the dataset of any n is found
// by walking down: on average at most one step more than the entropy of the weights in bits.
//
// The lighter side is the left one, so p <= 1/2 keeps its relative precision; p counts units of
// 2^-63, so that the rounding of p moves no count by a sample for any n <= 2^62.
class WeightTree {
  public:
    struct Place {
        i64 leaf;
        i64 ordinal;
    };

    static WeightTree from_weights(const std::vector<double>& weights) {
        int top = -10000;
        for (const double weight : weights) {
            if (!(std::isfinite(weight) && weight > 0)) {
                throw std::invalid_argument("a weight must be finite and above 0, not " +
                                            std::to_string(weight));
            }
            top = std::max(top, std::ilogb(weight));
        }
        // A power of two scales exactly and keeps the sums finite; the floor keeps them above 0.
        std::vector<double> scaled;
        for (const double weight : weights) {
            scaled.push_back(std::max(std::ldexp(weight, -top), std::ldexp(1.0, -1000)));
        }
        return WeightTree(scaled, [](double left, double right) {
            return static_cast<u64>(std::ldexp(left / (left + right), kBits));
        });
    }

    // Weights that are sample counts: shares in integers, so that the first sum(sizes) samples are
    // exactly sizes[i] of each dataset i.
    static WeightTree from_sizes(const std::vector<i64>& sizes) {
        return WeightTree(sizes, [](i64 left, i64 right) {
            const u128 total = static_cast<u128>(left) + static_cast<u128>(right);
            return static_cast<u64>((static_cast<u128>(left) << kBits) / total);
        });
    }

    i64 num_leaves() const { return num_leaves_; }

    // The dataset that the n-th sample comes from, and its place among that dataset's samples.
    Place locate(i64 n) const {
        i64 id = root();
        while (id >= num_leaves_) {
            const Node& node = nodes_[id - num_leaves_];
            const i64 before = node.left_of(n);
            if (node.left_of(n + 1) > before) {
                id = node.left;
                n = before;
            } else {
                id = node.right;
                n -= before;
            }
        }
        return {id, n};
    }

    // How many of the first n samples come from each dataset.
    std::vector<i64> counts(i64 n) const {
        std::vector<i64> result(num_leaves_ + nodes_.size());
        result[root()] = n;
        for (i64 id = root(); id >= num_leaves_; --id) {  // parents come after their children
            const Node& node = nodes_[id - num_leaves_];
            result[node.left] = node.left_of(result[id]);
            result[node.right] = result[id] - result[node.left];
        }
        result.resize(num_leaves_);
        return result;
    }

    // How many of the first n samples come from one dataset: counts(n)[leaf].
    i64 count(i64 leaf, i64 n) const {
        if (leaf == root()) return n;
        const Node& parent = nodes_[parents_[leaf] - num_leaves_];
        const i64 total = count(parents_[leaf], n);
        const i64 left = parent.left_of(total);
        return leaf == parent.left ? left : total - left;
    }

  private:
    static constexpr int kBits = 63;

    struct Node {
        u64 share;
        i64 left, right;  // ids: leaves first, then nodes in the order of their making

        i64 left_of(i64 n) const {
            const u128 half = static_cast<u128>(1) << (kBits - 1);
            return static_cast<i64>((static_cast<u128>(share) * static_cast<u64>(n) + half) >>
                                    kBits);
        }
    };

    template <class Weight, class Share>
    WeightTree(const std::vector<Weight>& weights, Share share) {
        if (weights.empty()) throw std::invalid_argument("a blend needs at least one dataset");
        num_leaves_ = static_cast<i64>(weights.size());
        parents_.assign(2 * num_leaves_ - 1, -1);
        using Item = std::pair<Weight, i64>;  // equal weights: the older id first
        std::priority_queue<Item, std::vector<Item>, std::greater<Item>> heap;
        for (i64 leaf = 0; leaf < num_leaves_; ++leaf) heap.push({weights[leaf], leaf});
        for (i64 id = num_leaves_; heap.size() > 1; ++id) {
            const Item left = heap.top();
            heap.pop();
            const Item right = heap.top();
            heap.pop();
            nodes_.push_back({share(left.first, right.first), left.second, right.second});
            parents_[left.second] = parents_[right.second] = id;
            heap.push({left.first + right.first, id});
        }
    }

    i64 root() const { return num_leaves_ + static_cast<i64>(nodes_.size()) - 1; }

    i64 num_leaves_ = 0;
    std::vector<Node> nodes_;
    std::vector<i64> parents_;
};

}  // namespace mer
