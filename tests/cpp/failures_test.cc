// What is left after a failure in the middle: for every k, the k-th operation or allocation of a call fails.

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "based/error.h"
#include "based/generation.h"
#include "based/session.h"
#include "faulty_backend.h"
#include "filled_memory.h"
#include "tiny_model.h"

namespace based {
namespace {

using test::Faults;
using test::FaultyBackend;
using test::floats;
using test::greedy;
using test::PlantedFault;
using test::random_tokens;
using test::read_bytes;
using test::TemporaryFolder;
using test::tiny_config;

using Prompts = std::vector<std::vector<std::int32_t>>;

std::shared_ptr<const Model> make_model(const std::shared_ptr<Faults>& faults) {
  RandomWeights weights(31);
  auto backend = std::make_unique<FaultyBackend>(backend::make_backend({}, 1), faults);
  return Model::Impl::make(tiny_config(), std::move(backend), weights, DType::float32);
}

class Failures : public ::testing::TestWithParam<bool> {  // whether every later call fails too
 protected:
  static constexpr int kMany = 2000;

  // The saved form of the states.
  std::string bytes(const Session& session) const {
    const TemporaryFolder dir;
    session.save_state(dir.path() / "state");
    return read_bytes(dir.path() / "state");
  }

  // Runs `call` with a fault at its k-th operation, for k = 0, 1, … until none is left to fail, and `check` after each
  // failure. A fault comes out as it is, and only when there was one.
  void for_every_fault(const std::function<void()>& prepare, const std::function<void()>& call,
                       const std::function<void()>& check) {
    int k = 0;
    for (; k < kMany; ++k) {
      SCOPED_TRACE("fault at operation " + std::to_string(k));
      prepare();
      faults_->arm(k, GetParam());
      bool failed = false;
      try {
        call();
      } catch (const PlantedFault& fault) {
        failed = true;
        planted_ = fault.what();
      }
      faults_->disarm();
      EXPECT_EQ(failed, faults_->fired());
      if (!failed) break;
      check();
      if (HasFailure()) return;
    }
    EXPECT_GT(k, 0);
    EXPECT_LT(k, kMany);
  }

  // Either sequence `b` of the session is what `expected` is, or the session says that it is broken, refuses it in
  // every call, and can be healed.
  void expect_whole_or_broken(Session& session, const std::string& expected) {
    try {
      EXPECT_TRUE(bytes(session) == expected);
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(" is broken: "), std::string::npos) << message;
      const std::vector<std::int32_t> tokens(static_cast<std::size_t>(session.batch_size()), 1);
      const Prompts prompts(tokens.size(), {1, 2});
      EXPECT_THROW(session.step(tokens), Error);
      EXPECT_THROW(session.prefill(prompts), Error);
      EXPECT_THROW(session.fork(), Error);
      EXPECT_THROW(session.checkpoint(), Error);
    }
  }

  std::string planted_;
  std::shared_ptr<Faults> faults_ = std::make_shared<Faults>();
  std::shared_ptr<const Model> model_ = make_model(faults_);
};

TEST(Memory, NothingIsReadBeforeItIsWritten) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    const auto results = [&](int fill) {
      return test::results_in_filled_memory(tiny_config(), backend::make_backend({}, 2), dtype, std::byte(fill));
    };
    EXPECT_EQ(results(0), results(0xff)) << name_of(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Failures, ::testing::Bool(),
                         [](const auto& param) { return param.param ? "FromThereOn" : "Once"; });

TEST_P(Failures, OfAPrompt) {
  Session session(model_, 2);
  const std::vector<int> first{0};
  session.prefill(Prompts{random_tokens(20, 1)}, first);  // one used sequence, one fresh
  const auto before = bytes(session);
  const auto checkpoint = session.checkpoint();
  for_every_fault([&] { session.rollback(*checkpoint); },
                  [&] { session.prefill(Prompts{random_tokens(300, 2), random_tokens(30, 3)}); },
                  [&] {
                    if (GetParam())
                      expect_whole_or_broken(session, before);
                    else
                      EXPECT_TRUE(bytes(session) == before);  // putting back did not fail
                    session.rollback(*checkpoint);
                    EXPECT_TRUE(bytes(session) == before);
                  });
}

TEST_P(Failures, OfAStep) {
  Session session(model_, 3);
  session.prefill(Prompts{random_tokens(20, 1), random_tokens(7, 2), random_tokens(9, 3)});
  const auto before = bytes(session);
  const auto checkpoint = session.checkpoint();
  const std::vector<std::int32_t> tokens{3, 4};
  const std::vector<int> sequences{2, 0};
  for_every_fault([&] { session.rollback(*checkpoint); }, [&] { session.step(tokens, sequences); },
                  [&] {
                    expect_whole_or_broken(session, before);
                    // The sequence that was not stepped is whole, whatever happened to the others.
                    const auto untouched = session.snapshot(1);
                    EXPECT_EQ(untouched->num_tokens(), 7);
                    session.rollback(*checkpoint);
                    EXPECT_TRUE(bytes(session) == before);
                  });
}

TEST_P(Failures, OfAGenerationOnASession) {
  const auto prompt = random_tokens(12, 4);
  Session session(model_, 1), replay(model_, 1);
  std::vector<std::int32_t> tokens;
  std::unique_ptr<Generator> generator;  // ends when no fault is planted: a destructor cannot report one
  const auto go = [&] {
    generator = std::make_unique<Generator>(session, std::vector<GenerationRequest>{{prompt, greedy(6)}});
    try {
      while (!generator->done())
        for (const TokenEvent& event : generator->next()) {
          if (event.finish == FinishReason::error) throw PlantedFault(event.error);
          tokens.push_back(event.token);
        }
    } catch (...) {
      if (generator) generator->finish(0, 0);  // as a reader does that stops: nothing may be fed twice
      throw;
    }
  };
  for_every_fault(
      [&] {
        generator.reset();
        session.reset();
        tokens.clear();
      },
      go,
      [&] {
        generator.reset();
        const auto count = session.num_tokens()[0];
        SCOPED_TRACE(planted_);
        try {
          bytes(session);
        } catch (const Error&) {
          return;  // broken, and says so
        }
        // It has seen exactly what it says: nothing, or the prompt and tokens that were returned.
        ASSERT_LE(count - 12, static_cast<std::int64_t>(tokens.size()));
        replay.reset();
        if (count > 0) {
          replay.prefill({&prompt, 1});
          for (std::int64_t i = 0; i < count - 12; ++i) replay.step({&tokens.at(static_cast<std::size_t>(i)), 1});
        }
        const std::int32_t next = 5;
        EXPECT_EQ(floats(session.step({&next, 1})), floats(replay.step({&next, 1})));
      });
}

TEST_P(Failures, OfAGenerationOfItsOwn) {
  SamplingParams two = greedy(4);
  two.n = 2;
  const std::vector<GenerationRequest> requests{{random_tokens(5, 1), greedy(5)}, {random_tokens(9, 2), two}};
  const MemoryUse before = model_->memory();
  std::unique_ptr<Generator> generator;  // ends when no fault is planted: a destructor cannot report one
  for_every_fault([&] { generator.reset(); },
                  [&] {
                    generator = std::make_unique<Generator>(model_, requests, 2);
                    while (!generator->done()) {
                      for (const TokenEvent& event : generator->next())
                        if (event.finish == FinishReason::error) throw PlantedFault(event.error);
                    }
                  },
                  [&] {
                    generator.reset();
                    const MemoryUse after = model_->memory();
                    EXPECT_EQ(after.states, before.states);
                    EXPECT_EQ(after.workspace, before.workspace);
                  });
}

TEST_P(Failures, OfWhatMovesStates) {
  const TemporaryFolder dir;
  Session session(model_, 2);
  session.prefill(Prompts{random_tokens(20, 1), random_tokens(7, 2)});
  const auto before = bytes(session);
  const auto checkpoint = session.checkpoint();
  session.save_state(dir.path() / "saved");
  session.step(std::vector<std::int32_t>{1, 2});
  const auto later = session.checkpoint();
  const auto stepped = bytes(session);
  const auto back = [&] { session.rollback(*later); };

  // These leave the session as it is.
  for (const std::function<void()>& call : std::vector<std::function<void()>>{
           [&] { session.fork(); },
           [&] { session.checkpoint(); },
           [&] { session.snapshot(1); },
           [&] { session.save_state(dir.path() / "other"); },
           [&] { const Session other(model_, later->states()); },
           [&] { State::load(dir.path() / "saved", model_, 1)->save(dir.path() / "one"); },
           [&] { session.load_state(dir.path() / "saved"); },
       })
    for_every_fault(
        [&] {
          back();
          session.step(std::vector<std::int32_t>{1, 2});  // nothing is known of these states
          session.load_state(dir.path() / "saved");
        },
        call, [&] { EXPECT_TRUE(bytes(session) == before); });

  // These change it; half-way they break it.
  for (const std::function<void()>& call : std::vector<std::function<void()>>{
           [&] { session.rollback(*checkpoint); },
           [&] { session.restore(1, *checkpoint->states()[0]); },
           [&] { session.reset(); },
           [&] { session.reset(0); },
           [&] { session.copy(0, 1); },
       })
    for_every_fault(back, call, [&] {
      expect_whole_or_broken(session, stepped);
      session.rollback(*checkpoint);
      EXPECT_TRUE(bytes(session) == before);
    });
}

TEST_P(Failures, OfForwardAndScore) {
  const auto tokens = random_tokens(30, 1);
  const auto logits = floats(model_->forward(tokens));
  const auto scores = model_->score(tokens);
  const MemoryUse before = model_->memory();
  for_every_fault([] {}, [&] { model_->forward(tokens); },
                  [&] { EXPECT_EQ(model_->memory().workspace, before.workspace); });
  for_every_fault([] {}, [&] { model_->score(tokens); }, [&] { EXPECT_EQ(model_->memory().states, before.states); });
  EXPECT_EQ(floats(model_->forward(tokens)), logits);
  EXPECT_EQ(model_->score(tokens), scores);
}

TEST_P(Failures, OfLoading) {
  std::shared_ptr<const Model> loaded;
  for_every_fault([&] { loaded.reset(); }, [&] { loaded = make_model(faults_); }, [&] { EXPECT_EQ(loaded, nullptr); });
  const auto tokens = random_tokens(30, 1);
  EXPECT_EQ(floats(loaded->forward(tokens)), floats(model_->forward(tokens)));
}

// ---- executors -----------------------------------------------------------------------------------------------------

TEST(Executors, SessionsForksAndCallsShareOne) {
  const auto faults = std::make_shared<Faults>();
  const auto model = make_model(faults);
  const MemoryUse before = model->memory();
  {
    std::vector<std::unique_ptr<Session>> sessions;
    for (int i = 0; i < 10; ++i) {
      sessions.push_back(std::make_unique<Session>(model, 2));
      sessions.back()->prefill(Prompts{random_tokens(20, 1), random_tokens(7, 2)});
      sessions.push_back(sessions.back()->fork());
      sessions.back()->step(std::vector<std::int32_t>{1, 2});
      model->forward(random_tokens(9, 3));
      model->score(random_tokens(9, 3));
    }
    {
      Generator generator(model, {{random_tokens(5, 4), greedy(3)}}, 1);
      while (!generator.done()) generator.next();
    }
    EXPECT_EQ(faults->num_siblings, 0);

    // Two that are busy at once need two, and no third is made after that.
    for (int i = 0; i < 3; ++i) {
      sessions[0]->prefill(Prompts{{1}, {2}}, {}, [&] { model->score(random_tokens(9, 3)); });
      EXPECT_EQ(faults->num_siblings, 1);
    }
  }
  const MemoryUse after = model->memory();
  EXPECT_EQ(after.states, before.states);
  EXPECT_EQ(after.workspace, before.workspace);
}

// ---- failures of one row -------------------------------------------------------------------------------------------

// A request whose logits leave no choice: every token is a stop token, and one must come before any of those.
SamplingParams impossible() {
  SamplingParams params = greedy(4);
  params.min_tokens = 1;
  for (std::int64_t token = 0; token < 61; ++token) params.stop_token_ids.push_back(token);
  return params;
}

TEST(FailuresOfOneRow, NeighboursEndAsIfAlone) {
  const auto model = Model::random(tiny_config(), 21);
  const auto run = [&](const std::vector<GenerationRequest>& requests, int batch) {
    Generator generator(model, requests, batch);
    std::vector<std::vector<TokenEvent>> events(requests.size());
    while (!generator.done())
      for (TokenEvent& event : generator.next())
        events[static_cast<std::size_t>(event.request)].push_back(std::move(event));
    return events;
  };
  const GenerationRequest good{random_tokens(8, 1), greedy(6)}, bad{random_tokens(5, 2), impossible()};
  const auto alone = run({good}, 1)[0];
  for (const int batch : {1, 2, 3}) {
    const auto events = run({good, bad, good}, batch);
    for (const std::size_t i : {0u, 2u}) {
      ASSERT_EQ(events[i].size(), alone.size());
      for (std::size_t t = 0; t < alone.size(); ++t) EXPECT_EQ(events[i][t].token, alone[t].token);
      EXPECT_EQ(events[i].back().finish, FinishReason::length);
    }
    ASSERT_EQ(events[1].size(), 1u);
    EXPECT_EQ(events[1][0].finish, FinishReason::error);
    EXPECT_EQ(events[1][0].token, -1);
    EXPECT_NE(events[1][0].error.find("leave no token"), std::string::npos) << events[1][0].error;
  }
}

// The token that can be chosen is chosen once: after it, penalties leave nothing.
TEST(FailuresOfOneRow, ASessionHasSeenWhatWasReturned) {
  const auto model = Model::random(tiny_config(), 21);
  std::vector<std::int32_t> prompt;
  SamplingParams params = greedy(5);
  params.repetition_penalty = 1e300;
  for (std::int32_t token = 0; token < 61; ++token) {
    if (token != 7) prompt.push_back(token);
    params.logit_bias.emplace_back(token, -100.0);
  }
  Session session(model, 1);
  std::vector<TokenEvent> events;
  {
    Generator generator(session, {{prompt, params}});
    while (!generator.done())
      for (TokenEvent& event : generator.next()) events.push_back(std::move(event));
  }
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].token, 7);
  EXPECT_EQ(events[1].finish, FinishReason::error);
  EXPECT_EQ(session.num_tokens()[0], 61);

  Session replay(model, 1);
  replay.prefill({&prompt, 1});
  const std::int32_t seven = 7, next = 5;
  replay.step({&seven, 1});
  EXPECT_EQ(floats(session.step({&next, 1})), floats(replay.step({&next, 1})));
}

// ---- interrupts ----------------------------------------------------------------------------------------------------

struct Interrupted {};

// What a call changes is undone when its last look finds an interrupt, and by undo_last().
TEST(Interrupts, UndoACallThatIsThrough) {
  const auto model = Model::random(tiny_config(), 21);
  const TemporaryFolder dir;
  Session other(model, 2);
  other.prefill(Prompts{random_tokens(9, 3), random_tokens(4, 4)});
  other.save_state(dir.path() / "other");
  const auto elsewhere = other.checkpoint();
  const std::vector<std::int32_t> tokens{3, 4}, probe{5, 6};
  using Call = std::function<void(Session&, const InterruptCheck&)>;
  const std::vector<std::pair<std::string, Call>> calls{
      {"prefill",
       [&](Session& s, const InterruptCheck& last) {
         s.prefill(Prompts{random_tokens(30, 5), random_tokens(2, 6)}, {}, {}, last);
       }},
      {"step", [&](Session& s, const InterruptCheck& last) { s.step(tokens, {}, last); }},
      {"one step",
       [&](Session& s, const InterruptCheck& last) {
         const int one[] = {1};
         s.step(std::span(tokens).first(1), one, last);
       }},
      {"reset", [&](Session& s, const InterruptCheck& last) { s.reset(last); }},
      {"reset one", [&](Session& s, const InterruptCheck& last) { s.reset(1, last); }},
      {"copy", [&](Session& s, const InterruptCheck& last) { s.copy(0, 1, last); }},
      {"restore", [&](Session& s, const InterruptCheck& last) { s.restore(0, *elsewhere->states()[1], last); }},
      {"rollback", [&](Session& s, const InterruptCheck& last) { s.rollback(*elsewhere, last); }},
      {"load", [&](Session& s, const InterruptCheck& last) { s.load_state(dir.path() / "other", last); }},
  };
  for (const bool fresh : {false, true}) {
    for (const auto& [name, call] : calls) {
      SCOPED_TRACE(name);
      Session session(model, 2);
      if (!fresh) {
        session.prefill(Prompts{random_tokens(20, 1), random_tokens(7, 2)});
        session.step(tokens);
      }
      const auto before = session.num_tokens();
      const auto same = [&] {
        EXPECT_EQ(session.num_tokens(), before);
        const auto fork = session.fork();
        Session replay(model, 2);
        if (!fresh) {
          replay.prefill(Prompts{random_tokens(20, 1), random_tokens(7, 2)});
          replay.step(tokens);
          // Going on needs what is kept beside the state, too.
          const GenerationRequest on{{}, greedy(2)};
          Generator a(*fork, {on, on}), b(replay, {on, on});
          while (!b.done()) {
            const auto found = a.next(), expected = b.next();
            ASSERT_EQ(found.size(), expected.size());
            for (std::size_t i = 0; i < found.size(); ++i) EXPECT_EQ(found[i].token, expected[i].token);
          }
        }
        EXPECT_EQ(floats(fork->step(probe)), floats(replay.step(probe)));
      };
      EXPECT_THROW(call(session, [] { throw Interrupted{}; }), Interrupted);
      same();
      int looked = 0;
      call(session, [&] { ++looked; });
      EXPECT_EQ(looked, 1);
      if (name == "prefill" || name == "load") continue;
      session.undo_last();
      same();
      session.undo_last();  // there is nothing more
      same();
    }
  }
}

// Tokens that a caller did not get, or has not read, are not seen by its session.
TEST(Interrupts, TokensThatAreNotReadAreNotSeen) {
  const auto model = Model::random(tiny_config(), 21);
  const auto prompt = random_tokens(9, 1);
  const std::vector<std::int32_t> probe{5};
  for (const std::int64_t max_tokens : {50, 3}) {
    for (const bool unread : {false, true}) {
      Session session(model, 1);
      Generator generator(session, {{prompt, greedy(max_tokens)}});
      std::vector<std::int32_t> read;
      for (int i = 0; i < 2; ++i) read.push_back(generator.next()[0].token);
      EXPECT_THROW(generator.next({}, [] { throw Interrupted{}; }), Interrupted);
      EXPECT_FALSE(generator.done());
      if (unread) generator.next();  // the same token again
      if (unread)
        generator.finish(0, 0, 2);
      else
        generator.finish(0, 0);
      EXPECT_TRUE(generator.done());
      EXPECT_EQ(session.num_tokens()[0], 9 + 2);
      Session replay(model, 1);
      replay.prefill({&prompt, 1});
      for (const std::int32_t token : read) replay.step({&token, 1});
      EXPECT_EQ(floats(session.step(probe)), floats(replay.step(probe)));
    }
  }
}

}  // namespace
}  // namespace based
