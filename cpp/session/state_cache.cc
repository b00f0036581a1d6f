#include "session/state_cache.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "based/error.h"
#include "io/text.h"
#include "model/model_impl.h"
#include "session/host_states.h"
#include "session/state_folder.h"
#include "session/state_impl.h"

namespace based {

namespace {

using Clock = std::chrono::steady_clock;
using Tokens = std::span<const std::int32_t>;

constexpr std::size_t kMostCopies = 16;   // states that wait to be copied to the host
constexpr std::size_t kMostWrites = 256;  // states that wait to be written to files
constexpr std::chrono::seconds kScanEvery{1};

// check_tokens() without a branch for each: prompts are long, and come here again with every state inside them.
void check_all(Tokens tokens, std::int64_t vocab_size) {
  std::uint32_t greatest = 0;  // a negative token is great
  for (const std::int32_t token : tokens) greatest = std::max(greatest, static_cast<std::uint32_t>(token));
  if (greatest >= static_cast<std::uint64_t>(vocab_size)) check_tokens(tokens, vocab_size, "state cache");
}

// All of these tokens, as a prompt's.
SeenTokens seen_of(Tokens tokens, std::int64_t vocab_size) {
  std::vector<std::uint64_t> seen(static_cast<std::size_t>(vocab_size + 63) / 64);  // a bit for each
  for (const std::int32_t token : tokens)
    seen[static_cast<std::size_t>(token) / 64] |= std::uint64_t{1} << (token % 64);
  std::size_t count = 0;
  for (const std::uint64_t word : seen) count += static_cast<std::size_t>(std::popcount(word));
  std::vector<backend::SeenToken> entries;
  entries.reserve(count);
  for (std::size_t i = 0; i < seen.size(); ++i)
    for (std::uint64_t rest = seen[i]; rest != 0; rest &= rest - 1)
      entries.push_back({static_cast<std::int32_t>(64 * i) + std::countr_zero(rest), true, 0});
  return SeenTokens::from_entries(std::move(entries));
}

// How many tokens both begin with.
std::size_t common_length(Tokens a, Tokens b) {
  const std::size_t most = std::min(a.size(), b.size());
  if (std::ranges::equal(a.first(most), b.first(most))) return most;  // as fast as memory is read
  return static_cast<std::size_t>(std::ranges::mismatch(a, b).in1 - a.begin());
}

// The same state with other counts for penalties: its memory is shared.
std::shared_ptr<const State> with_seen(const State& state, SeenTokens seen) {
  auto impl = std::make_unique<State::Impl>();
  impl->model = state.model();
  impl->states = state.impl().states;
  impl->made = state.impl().made;
  impl->progress = {state.num_tokens(), state.impl().progress.last, std::move(seen)};
  return std::make_shared<State>(std::move(impl));
}

void check(const StateCacheOptions& options, const Model& model) {
  const auto refuse = [](const std::string& why) { throw InvalidArgument("state cache: " + why); };
  for (const auto& [name, value] :
       {std::pair("interval", options.interval), std::pair("min_branch_tokens", options.min_branch_tokens),
        std::pair("min_host_tokens", options.min_host_tokens), std::pair("min_file_tokens", options.min_file_tokens)})
    if (value < 1) refuse(io::concat(name, " must be at least 1, got ", value));
  if (options.write_delay.count() < 0)
    refuse(io::concat("write_delay must be at least 0 ms, got ", options.write_delay.count()));
  if (options.folder.empty() != (options.folder_nbytes == 0))
    refuse(options.folder.empty() ? "found folder_nbytes without a folder"
                                  : "found a folder without folder_nbytes, expected the most bytes of its files");
  if (options.device_nbytes == 0) {
    if (options.host_nbytes > 0 || !options.folder.empty())
      refuse("found a tier of the host or of files without device_nbytes, through which their states go");
    return;
  }
  if (options.host_nbytes > 0 && model.impl().executors.device().shares_host_memory())
    refuse(io::concat("found host_nbytes ", options.host_nbytes,
                      ", expected 0 on a CPU: its states are in the host's memory already (device_nbytes)"));
  const std::size_t least = model.impl().state_nbytes_of(1);
  for (const auto& [name, nbytes] :
       {std::pair("device_nbytes", options.device_nbytes), std::pair("host_nbytes", options.host_nbytes)})
    if (nbytes > 0 && nbytes < least)
      refuse(io::concat(name, " is ", nbytes, ", expected 0 or at least the ", least, " bytes of a state"));
}

}  // namespace

class StateCache::Impl {
 public:
  Impl(std::shared_ptr<const Model> model, const StateCacheOptions& options);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  Match find(Tokens tokens, std::int64_t most);
  void insert(Tokens tokens, const State& state);
  std::size_t release(std::size_t nbytes);
  void clear();
  void flush();
  StateCacheStats stats() const;
  bool in_this_process() const { return ::getpid() == process_; }
  void set_seconds_per_token(double seconds) { seconds_per_token_ = seconds; }

 private:
  struct Node;
  // In the order of eviction.
  struct Place {
    bool is_end;      // see StateCache::Impl::is_end
    double priority;  // the tier's clock at the last use, and tokens to recompute per byte
    std::uint64_t use;
    Node* node;
    bool operator<(const Place& other) const {
      return std::tie(is_end, priority, use) < std::tie(other.is_end, other.priority, other.use);
    }
  };
  // That a node has a state in a tier.
  struct Held {
    std::size_t nbytes = 0;  // 0: it has none
    double clock = 0;
    Place place{};
  };
  struct Node {
    std::uint64_t id = 0;
    Node* parent = nullptr;
    std::vector<std::int32_t> edge;          // the tokens from the parent to here
    std::int64_t depth = 0;                  // tokens from the root to here
    std::map<std::int32_t, Node*> children;  // by the first token of the edge
    std::shared_ptr<const State> state;
    std::shared_ptr<const HostState> copy;
    Held on_device, on_host;
    int pins = 0;          // by those who need it to stay as it is
    bool copying = false;  // waits to be copied to the host
    bool writing = false;  // waits to be written

    bool holds() const { return on_device.nbytes > 0 || on_host.nbytes > 0; }
  };
  struct Tier {
    Held Node::* held;
    StateCacheStats::Tier stats;  // nbytes: with what is reserved for copies under way
    double clock = 0;
    std::set<Place> order;
  };
  // What evictions leave to be destroyed when the lock is gone.
  using Dropped = std::vector<std::shared_ptr<const void>>;
  struct Write {
    Clock::time_point due;
    std::uint64_t id;
  };

  // The caller of these holds the lock. When one throws std::bad_alloc, forget_all() makes the tree whole.
  Node* look_up(std::uint64_t id);
  Node& path_to(Tokens tokens);
  Node& add_child(Node& parent, Tokens edge);
  Node& split(Node& node, std::size_t length);
  void prune(Node* node);
  std::int64_t cost(const Node& node) const;
  static bool is_end(const Node& node);
  Place place_of(const Tier& tier, Node& node, std::uint64_t use) const;
  void place(Node& node);
  void place_others(Node& node);
  void hold(Tier& tier, Node& node, std::size_t nbytes);
  void use(Tier& tier, Node& node);
  void drop(Tier& tier, Node& node, Dropped& dropped);
  bool evict(Tier& tier, Dropped& dropped);
  bool make_room(Tier& tier, std::size_t nbytes, Dropped& dropped);
  Node* keep(Tokens tokens, std::shared_ptr<const State> state, Dropped& dropped);
  void forget_all(Dropped& dropped) noexcept;
  void plan_copies();
  void plan_write(Node& node);
  std::vector<std::int32_t> tokens_of(const Node& node) const;

  void fail(const std::exception& error) noexcept;
  std::shared_ptr<const State> read_file(Tokens tokens, std::int64_t least);

  // The thread of copies and files. These take the lock, which they let go while they work.
  void work();
  void copy_to_host(std::uint64_t id, std::unique_lock<std::mutex>& lock);
  void write_file(std::uint64_t id, std::unique_lock<std::mutex>& lock);

  const std::shared_ptr<const Model> model_;
  const StateCacheOptions options_;
  const pid_t process_ = ::getpid();
  std::shared_ptr<HostMemory> host_memory_;  // null: no such tier
  std::unique_ptr<StateFolder> folder_;      // likewise
  std::atomic<double> seconds_per_token_{0};

  mutable std::mutex mutex_;  // of what follows
  Node root_;
  std::unordered_map<std::uint64_t, std::unique_ptr<Node>> nodes_;  // all but the root
  Tier device_{&Node::on_device, {}, 0, {}}, host_{&Node::on_host, {}, 0, {}};
  std::uint64_t last_id_ = 0, last_use_ = 0;
  StateCacheStats counts_;  // without tiers
  std::int64_t file_hit_tokens_ = 0, file_stored_tokens_ = 0;
  std::deque<std::uint64_t> copies_;
  std::deque<Write> writes_;
  bool busy_ = false;
  int num_flushing_ = 0;
  std::condition_variable work_, idle_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

StateCache::Impl::Impl(std::shared_ptr<const Model> model, const StateCacheOptions& options)
    : model_(std::move(model)), options_(options) {
  device_.stats.max_nbytes = options.device_nbytes;
  host_.stats.max_nbytes = options.host_nbytes;
  if (options.host_nbytes > 0) host_memory_ = std::make_shared<HostMemory>(*model_, options.host_nbytes);
  if (!options.folder.empty()) folder_ = std::make_unique<StateFolder>(options.folder, options.folder_nbytes, *model_);
  if (host_memory_ || folder_) thread_ = std::thread([this] { work(); });
}

StateCache::Impl::~Impl() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  idle_.notify_all();
  if (thread_.joinable()) thread_.join();
}

// ---- the tree ------------------------------------------------------------------------------------------------------

StateCache::Impl::Node* StateCache::Impl::look_up(std::uint64_t id) {
  const auto it = nodes_.find(id);
  return it == nodes_.end() ? nullptr : it->second.get();
}

// The node after these tokens, made where it is missing.
StateCache::Impl::Node& StateCache::Impl::path_to(Tokens tokens) {
  Node* node = &root_;
  while (!tokens.empty()) {
    const auto it = node->children.find(tokens.front());
    if (it == node->children.end()) return add_child(*node, tokens);
    Node* child = it->second;
    const std::size_t common = common_length(tokens, child->edge);
    if (common < child->edge.size()) child = &split(*child, common);
    node = child;
    tokens = tokens.subspan(common);
  }
  return *node;
}

StateCache::Impl::Node& StateCache::Impl::add_child(Node& parent, Tokens edge) {
  auto owned = std::make_unique<Node>();
  Node& node = *owned;
  node.id = ++last_id_;
  node.parent = &parent;
  node.edge.assign(edge.begin(), edge.end());
  node.depth = parent.depth + static_cast<std::int64_t>(edge.size());
  nodes_.emplace(node.id, std::move(owned));
  parent.children[edge.front()] = &node;
  place(parent);
  return node;
}

// A node after the first `length` tokens of a node's edge.
StateCache::Impl::Node& StateCache::Impl::split(Node& node, std::size_t length) {
  auto owned = std::make_unique<Node>();
  Node& middle = *owned;
  middle.id = ++last_id_;
  middle.parent = node.parent;
  middle.edge.assign(node.edge.begin(), node.edge.begin() + static_cast<std::ptrdiff_t>(length));
  middle.depth = node.depth - static_cast<std::int64_t>(node.edge.size() - length);
  middle.children[node.edge[length]] = &node;
  nodes_.emplace(middle.id, std::move(owned));
  node.edge.erase(node.edge.begin(), node.edge.begin() + static_cast<std::ptrdiff_t>(length));
  middle.parent->children[middle.edge.front()] = &middle;
  node.parent = &middle;
  place(*middle.parent);
  return middle;
}

// Removes nodes that have no state and are no forks, from this one upwards.
void StateCache::Impl::prune(Node* node) {
  while (node != &root_ && !node->holds() && node->pins == 0 && node->children.size() < 2) {
    Node* const parent = node->parent;
    if (!node->children.empty()) {  // its only child takes its edge
      Node* const child = node->children.begin()->second;
      node->edge.insert(node->edge.end(), child->edge.begin(), child->edge.end());
      child->edge.swap(node->edge);
      child->parent = parent;
      parent->children.find(child->edge.front())->second = child;
      nodes_.erase(node->id);
      place(*parent);
      return;
    }
    parent->children.erase(node->edge.front());
    nodes_.erase(node->id);
    place(*parent);
    node = parent;
  }
}

std::vector<std::int32_t> StateCache::Impl::tokens_of(const Node& node) const {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(node.depth));
  for (const Node* n = &node; n != &root_; n = n->parent)
    std::ranges::copy(n->edge, tokens.begin() + (n->parent->depth));
  return tokens;
}

// ---- what to keep --------------------------------------------------------------------------------------------------

// Tokens that would have to be read again without this node's state.
std::int64_t StateCache::Impl::cost(const Node& node) const {
  const Node* before = node.parent;
  while (before != &root_ && !before->holds()) before = before->parent;
  return node.depth - before->depth;
}

// A leaf, a fork, or what a fork without a state goes on from; otherwise an interior point of a path.
bool StateCache::Impl::is_end(const Node& node) {
  return node.children.size() != 1 || !node.children.begin()->second->holds();
}

StateCache::Impl::Place StateCache::Impl::place_of(const Tier& tier, Node& node, std::uint64_t use) const {
  const Held& held = node.*tier.held;
  const double saved = static_cast<double>(cost(node)) / static_cast<double>(held.nbytes);
  return {is_end(node), held.clock + saved, use, &node};
}

// Puts a node into its place again, after its costs or its children have changed.
void StateCache::Impl::place(Node& node) {
  for (Tier* tier : {&device_, &host_}) {
    Held& held = node.*tier->held;
    if (held.nbytes == 0) continue;
    auto entry = tier->order.extract(held.place);
    held.place = place_of(*tier, node, held.place.use);
    entry.value() = held.place;
    tier->order.insert(std::move(entry));
  }
}

// The same of those that depend on whether this one has a state: the node above, and the next ones below that have one,
// whose costs begin here.
void StateCache::Impl::place_others(Node& node) {
  if (node.parent != nullptr) place(*node.parent);
  std::vector<Node*> rest{&node};
  while (!rest.empty()) {
    Node* const next = rest.back();
    rest.pop_back();
    for (const auto& [token, child] : next->children) {
      if (child->holds())
        place(*child);
      else
        rest.push_back(child);
    }
  }
}

// The node has a state in the tier, for which there is room.
void StateCache::Impl::hold(Tier& tier, Node& node, std::size_t nbytes) {
  const bool is_new = !node.holds();
  Held& held = node.*tier.held;
  held.nbytes = nbytes;
  tier.stats.nbytes += nbytes;
  ++tier.stats.num_states;
  held.clock = tier.clock;
  held.place = place_of(tier, node, ++last_use_);
  tier.order.insert(held.place);
  tier.stats.stored_tokens += cost(node);
  if (is_new) place_others(node);
}

void StateCache::Impl::use(Tier& tier, Node& node) {
  Held& held = node.*tier.held;
  if (held.nbytes == 0) return;
  auto entry = tier.order.extract(held.place);
  held.clock = tier.clock;
  held.place = place_of(tier, node, ++last_use_);
  entry.value() = held.place;
  tier.order.insert(std::move(entry));
}

void StateCache::Impl::drop(Tier& tier, Node& node, Dropped& dropped) {
  Held& held = node.*tier.held;
  tier.order.erase(held.place);
  tier.stats.nbytes -= held.nbytes;
  --tier.stats.num_states;
  held = {};
  if (&tier == &device_)
    dropped.push_back(std::move(node.state));
  else
    dropped.push_back(std::move(node.copy));
  if (!node.holds()) place_others(node);
}

// Gives up the state that saves least. False: there is none that may go.
bool StateCache::Impl::evict(Tier& tier, Dropped& dropped) {
  const auto victim = std::ranges::find_if(tier.order, [](const Place& place) { return place.node->pins == 0; });
  if (victim == tier.order.end()) return false;
  Node& node = *victim->node;
  if (victim->is_end) tier.clock = std::max(tier.clock, victim->priority);
  ++tier.stats.num_evicted;
  tier.stats.evicted_tokens += cost(node);
  if (&tier == &device_ && host_memory_ && node.on_host.nbytes == 0) ++counts_.num_not_copied;
  drop(tier, node, dropped);
  prune(&node);
  return true;
}

bool StateCache::Impl::make_room(Tier& tier, std::size_t nbytes, Dropped& dropped) {
  if (nbytes > tier.stats.max_nbytes) return false;
  while (tier.stats.nbytes > tier.stats.max_nbytes - nbytes)
    if (!evict(tier, dropped)) return false;
  return true;
}

// Keeps a state on the device. Null: it was there before, or there is no room.
StateCache::Impl::Node* StateCache::Impl::keep(Tokens tokens, std::shared_ptr<const State> state, Dropped& dropped) {
  const std::size_t nbytes = state->nbytes();
  if (nbytes > device_.stats.max_nbytes) {
    ++counts_.num_not_stored;
    return nullptr;
  }
  // First its place, for what others save depends on it; then room.
  Node& node = path_to(tokens);
  if (node.on_device.nbytes > 0) {
    use(device_, node);
    return nullptr;
  }
  hold(device_, node, nbytes);
  node.state = std::move(state);
  ++node.pins;
  const bool has_room = make_room(device_, 0, dropped);
  --node.pins;
  if (!has_room) {
    ++counts_.num_not_stored;
    device_.stats.stored_tokens -= cost(node);
    drop(device_, node, dropped);
    prune(&node);
    return nullptr;
  }
  plan_copies();
  return &node;
}

void StateCache::Impl::forget_all(Dropped& dropped) noexcept {
  for (Tier* tier : {&device_, &host_}) {
    for (const auto& [id, node] : nodes_) tier->stats.nbytes -= (*node.*tier->held).nbytes;
    tier->stats.num_states = 0;
    tier->order.clear();
  }
  copies_.clear();
  writes_.clear();
  root_.children.clear();
  try {
    for (const auto& [id, node] : nodes_) {
      dropped.push_back(node->state);
      dropped.push_back(node->copy);
    }
  } catch (const std::bad_alloc&) {  // then they are destroyed here, under the lock
  }
  nodes_.clear();
}

// ---- calls ---------------------------------------------------------------------------------------------------------

void StateCache::Impl::insert(Tokens tokens, const State& state) {
  const auto n = static_cast<std::int64_t>(tokens.size());
  if (state.num_tokens() != n)
    throw InvalidArgument(io::concat("state cache: found a state that has seen ", state.num_tokens(),
                                     " tokens, expected the ", n, " given"));
  if (state.model() != model_) throw StateError("state cache: found the state of another model");
  if (n == 0) return;
  check_all(tokens, model_->config().vocab_size);
  if (n < model_->config().prefix_tokens() || !state.impl().progress.last.rows.data) return;
  Dropped dropped;
  const std::lock_guard lock(mutex_);
  try {
    if (Node* const node = keep(tokens, with_seen(state, {}), dropped)) plan_write(*node);
  } catch (const std::bad_alloc& error) {
    ++counts_.num_not_stored;
    fail(error);
    forget_all(dropped);
  }
}

std::shared_ptr<const State> StateCache::Impl::read_file(Tokens tokens, std::int64_t least) {
  if (!folder_) return nullptr;
  try {
    for (const StateFolder::File& file : folder_->find(tokens, least + options_.min_file_tokens - 1)) {
      const double saved = seconds_per_token_ * static_cast<double>(file.num_tokens - least);
      if (saved > 0 && !folder_->reads_within(file, saved)) continue;
      if (auto state = folder_->read(file, tokens.first(static_cast<std::size_t>(file.num_tokens)), model_))
        return state;
    }
  } catch (const std::bad_alloc& error) {
    const std::lock_guard lock(mutex_);
    fail(error);
  }
  return nullptr;
}

StateCache::Match StateCache::Impl::find(Tokens tokens, std::int64_t most) {
  Match match;
  tokens = tokens.first(static_cast<std::size_t>(std::clamp<std::int64_t>(most, 0, std::ssize(tokens))));
  if (tokens.empty()) return match;
  check_all(tokens, model_->config().vocab_size);

  // The deepest state on the device, and those deeper that are on the host only.
  struct Found {
    std::uint64_t id = 0;
    std::int64_t depth = 0;
    std::shared_ptr<const State> state;
    std::shared_ptr<const HostState> copy;
  };
  Found on_device;
  std::vector<Found> on_host;
  std::int64_t matched = 0;
  {
    const std::lock_guard lock(mutex_);
    counts_.query_tokens += std::ssize(tokens);
    const Node* node = &root_;
    for (Tokens rest = tokens; !rest.empty();) {
      const auto it = node->children.find(rest.front());
      if (it == node->children.end()) break;
      node = it->second;
      const std::size_t common = common_length(rest, node->edge);
      matched += static_cast<std::int64_t>(common);
      if (common < node->edge.size()) break;
      rest = rest.subspan(node->edge.size());
      if (node->state) {
        on_device = {node->id, node->depth, node->state, nullptr};
        on_host.clear();
      } else if (node->copy) {
        on_host.push_back({node->id, node->depth, nullptr, node->copy});
      }
    }
  }

  std::shared_ptr<const State> state;
  const std::int64_t least = on_device.depth + options_.min_host_tokens;
  std::erase_if(on_host, [&](const Found& found) { return found.depth < least; });
  if ((state = read_file(tokens, on_host.empty() ? on_device.depth : on_host.back().depth)))
    match.tier = CacheTier::files;
  for (; !state && !on_host.empty(); on_host.pop_back()) {
    try {
      state = on_host.back().copy->to_device();
      match.tier = CacheTier::host;
      break;
    } catch (const std::bad_alloc& error) {
      const std::lock_guard lock(mutex_);
      fail(error);
    }
  }
  if (!state) state = on_device.state;

  Dropped dropped;
  try {
    std::shared_ptr<const State> kept;
    const Tokens seen = tokens.first(state ? static_cast<std::size_t>(state->num_tokens()) : 0);
    if (state) {
      match.num_tokens = state->num_tokens();
      match.state = with_seen(*state, seen_of(seen, model_->config().vocab_size));
      if (match.tier != CacheTier::device) kept = with_seen(*state, {});
    }
    const std::lock_guard lock(mutex_);
    if (state) {
      counts_.hit_tokens += match.num_tokens;
      if (match.tier == CacheTier::device) {
        device_.stats.hit_tokens += match.num_tokens;
        if (Node* const node = look_up(on_device.id)) use(device_, *node);
      } else {
        (match.tier == CacheTier::host ? host_.stats.hit_tokens : file_hit_tokens_) += match.num_tokens;
        if (match.tier == CacheTier::host)
          if (Node* const node = look_up(on_host.back().id)) use(host_, *node);
        keep(seen, std::move(kept), dropped);
      }
    }
  } catch (const std::bad_alloc& error) {
    const std::lock_guard lock(mutex_);
    fail(error);
    forget_all(dropped);
    return {};
  }
  if (matched - match.num_tokens >= options_.min_branch_tokens && matched >= model_->config().prefix_tokens())
    match.branch = matched;
  return match;
}

std::size_t StateCache::Impl::release(std::size_t nbytes) {
  Dropped dropped;
  const std::lock_guard lock(mutex_);
  const std::size_t before = device_.stats.nbytes;
  try {
    while (before - device_.stats.nbytes < nbytes && evict(device_, dropped)) {
    }
  } catch (const std::bad_alloc& error) {
    fail(error);
    forget_all(dropped);
  }
  return before - device_.stats.nbytes;
}

void StateCache::Impl::clear() {
  Dropped dropped;
  const std::lock_guard lock(mutex_);
  forget_all(dropped);
}

void StateCache::Impl::flush() {
  if (!thread_.joinable()) return;
  std::unique_lock lock(mutex_);
  ++num_flushing_;
  work_.notify_all();
  idle_.wait(lock, [this] { return stop_ || (copies_.empty() && writes_.empty() && !busy_); });
  --num_flushing_;
}

StateCacheStats StateCache::Impl::stats() const {
  StateFolder::Stats files;
  if (folder_) files = folder_->stats();
  const std::lock_guard lock(mutex_);
  StateCacheStats stats = counts_;
  stats.device = device_.stats;
  stats.host = host_.stats;
  stats.files = {files.num_files,     files.nbytes,         options_.folder_nbytes, file_hit_tokens_,
                 file_stored_tokens_, files.evicted_tokens, files.num_evicted};
  stats.num_refused_files = files.num_refused;
  if (!files.last_refusal.empty() && stats.last_error.empty()) stats.last_error = files.last_refusal;
  return stats;
}

void StateCache::Impl::fail(const std::exception& error) noexcept {
  ++counts_.num_failed_copies;
  try {
    counts_.last_error = error.what();
  } catch (const std::bad_alloc&) {
  }
}

// ---- copies and files ----------------------------------------------------------------------------------------------

// A quarter of the device's memory is to be free, or copied to the host already: of the states that would go first.
void StateCache::Impl::plan_copies() {
  if (!host_memory_) return;
  std::size_t safe = device_.stats.max_nbytes - device_.stats.nbytes;
  for (const Place& place : device_.order) {
    if (safe >= device_.stats.max_nbytes / 4 || copies_.size() >= kMostCopies) break;
    Node& node = *place.node;
    safe += node.on_device.nbytes;
    if (node.copying || node.on_host.nbytes > 0) continue;
    copies_.push_back(node.id);
    node.copying = true;
    work_.notify_one();
  }
}

void StateCache::Impl::plan_write(Node& node) {
  if (!folder_ || node.writing || node.depth < options_.min_file_tokens) return;
  if (writes_.size() >= kMostWrites) {
    ++counts_.num_not_copied;
    return;
  }
  writes_.push_back({Clock::now() + options_.write_delay, node.id});
  node.writing = true;
  work_.notify_one();
}

void StateCache::Impl::work() {
  std::unique_lock lock(mutex_);
  Clock::time_point next_scan = Clock::now() + kScanEvery;
  while (!stop_) {
    const Clock::time_point now = Clock::now();
    if (!copies_.empty()) {
      const std::uint64_t id = copies_.front();
      copies_.pop_front();
      copy_to_host(id, lock);
    } else if (!writes_.empty() && (num_flushing_ > 0 || writes_.front().due <= now)) {
      const std::uint64_t id = writes_.front().id;
      writes_.pop_front();
      write_file(id, lock);
    } else if (folder_ && next_scan <= now) {
      lock.unlock();
      try {
        folder_->scan();
        lock.lock();
      } catch (const std::exception& error) {
        lock.lock();
        fail(error);
      }
      next_scan = Clock::now() + kScanEvery;
    } else {
      if (writes_.empty()) idle_.notify_all();
      if (!folder_)
        work_.wait(lock);
      else
        work_.wait_until(lock, writes_.empty() ? next_scan : std::min(next_scan, writes_.front().due));
    }
  }
}

void StateCache::Impl::copy_to_host(std::uint64_t id, std::unique_lock<std::mutex>& lock) {
  Node* node = look_up(id);
  if (node == nullptr) return;
  node->copying = false;
  if (!node->state || node->copy) return;
  std::shared_ptr<const State> state = node->state;
  std::shared_ptr<const HostState> copy;
  Dropped dropped;
  std::size_t nbytes = 0;
  try {
    nbytes = host_memory_->nbytes_of(*state);
    ++node->pins;
    const bool room = make_room(host_, nbytes, dropped);
    --node->pins;
    if (!room) {
      ++counts_.num_not_copied;
      return;
    }
  } catch (const std::bad_alloc& error) {
    fail(error);
    forget_all(dropped);
    return;
  }
  ++node->pins;
  host_.stats.nbytes += nbytes;
  busy_ = true;
  lock.unlock();
  std::exception_ptr failure;
  try {
    dropped.clear();  // whose blocks this copy may take
    copy = std::make_shared<const HostState>(*state, host_memory_);
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  busy_ = false;
  host_.stats.nbytes -= nbytes;
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    fail(error);
  }
  node = look_up(id);
  if (node != nullptr) {
    --node->pins;
    try {
      if (copy && node->on_host.nbytes == 0) {
        hold(host_, *node, nbytes);
        node->copy = std::move(copy);
      }
      prune(node);
    } catch (const std::bad_alloc& error) {
      fail(error);
      forget_all(dropped);
    }
  }
  lock.unlock();
  dropped.clear();
  copy.reset();
  state.reset();
  lock.lock();
}

void StateCache::Impl::write_file(std::uint64_t id, std::unique_lock<std::mutex>& lock) {
  Node* node = look_up(id);
  if (node == nullptr) return;
  node->writing = false;
  if (!node->holds() || !is_end(*node)) return;
  const auto state = node->state;
  const auto copy = node->copy;
  std::vector<std::int32_t> tokens;
  ++node->pins;
  busy_ = true;
  bool written = false, wanted = false;
  std::exception_ptr failure;
  try {
    tokens = tokens_of(*node);
    lock.unlock();
    const auto n = static_cast<std::int64_t>(tokens.size());
    wanted = folder_->find(tokens, std::max<std::int64_t>(n - options_.min_file_tokens, 0)).empty();
    if (wanted) {
      const auto source = state ? state : copy->to_device();
      source->impl().wait();
      Progress progress = source->impl().progress;
      progress.seen = seen_of(tokens, model_->config().vocab_size);
      std::optional<ExportedStates> exported;
      {
        const auto lease = model_->impl().executors.lease();
        const SequenceView sequence{source->impl().states.get(), 0, &progress, tokens};
        exported.emplace(*model_, lease->backend(), std::span(&sequence, 1));
      }
      written = folder_->write(tokens, *exported, stop_);
    }
  } catch (...) {
    failure = std::current_exception();
  }
  if (!lock.owns_lock()) lock.lock();
  busy_ = false;
  if (written) file_stored_tokens_ += static_cast<std::int64_t>(tokens.size());
  if (wanted && !written && !failure) ++counts_.num_not_copied;
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    fail(error);
  }
  Dropped dropped;
  node = look_up(id);
  if (node == nullptr) return;
  --node->pins;
  try {
    prune(node);
  } catch (const std::bad_alloc& error) {
    fail(error);
    forget_all(dropped);
  }
}

// ---- StateCache ----------------------------------------------------------------------------------------------------

StateCache::StateCache(std::shared_ptr<const Model> model, const StateCacheOptions& options) : options_(options) {
  check(options, *model);
  impl_ = std::make_unique<Impl>(std::move(model), options);
}

StateCache::~StateCache() {
  // In a forked child its thread does not exist, and its lock may be held for ever.
  if (!impl_->in_this_process()) static_cast<void>(impl_.release());
}

StateCache::Match StateCache::find(std::span<const std::int32_t> tokens, std::int64_t most) {
  return enabled() ? impl_->find(tokens, most) : Match{};
}

void StateCache::insert(std::span<const std::int32_t> tokens, std::shared_ptr<const State> state) {
  if (!enabled()) return;
  impl_->insert(tokens, *state);
}

void StateCache::set_seconds_per_token(double seconds) { impl_->set_seconds_per_token(seconds); }
std::size_t StateCache::release(std::size_t nbytes) { return impl_->release(nbytes); }
void StateCache::clear() { impl_->clear(); }
void StateCache::flush() { impl_->flush(); }
StateCacheStats StateCache::stats() const { return impl_->stats(); }

}  // namespace based
