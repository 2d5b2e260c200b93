// Whether an error of an operation's evaluate() reaches the user.
#pragma once

#include <algorithm>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.hpp"

namespace ov_ext {

// OpenVINO runs requests in threads of its streams, which report errors. The exception is a single stream with a single thread: infer()
// runs it in the thread of the caller, where an error is swallowed, and the failed task stays queued. The next inference in that thread
// runs it again, perhaps after its request and model are gone. So nothing may be thrown there.
//
// A stream thread is one that builds a graph: plug-ins call has_evaluate() there. The thread that compiles a model may call it as well, and
// may be the one that calls infer(); it is known because it has made the node.
class StreamThreads {
  public:
    void add_this() {  // from has_evaluate()
        std::lock_guard<std::mutex> lock(m_mutex);
        m_compiled = true;
        if (std::this_thread::get_id() != m_maker)
            m_threads.push_back(std::this_thread::get_id());
    }
    bool errors_are_reported() const {  // in evaluate(); where nothing was compiled, ov::Model::evaluate() called it
        std::lock_guard<std::mutex> lock(m_mutex);
        const bool is_one = std::find(m_threads.begin(), m_threads.end(), std::this_thread::get_id()) != m_threads.end();
        return max_threads() > 1 || !m_compiled || is_one;
    }

  private:
    mutable std::mutex m_mutex;
    const std::thread::id m_maker = std::this_thread::get_id();
    bool m_compiled = false;
    std::vector<std::thread::id> m_threads;
};

}  // namespace ov_ext
