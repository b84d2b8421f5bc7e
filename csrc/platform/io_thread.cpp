#include "platform/io_thread.h"

#include <pthread.h>
#include <signal.h>

#include <exception>
#include <string>

#include "base/error.h"

namespace puna {

std::thread start_io_thread(std::function<void()> body) {
  // A handler of the application's signals must not run there.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  std::string refusal;
  try {
    thread = std::thread([body = std::move(body)] {
      pthread_setname_np(pthread_self(), "puna-io");
      body();
    });
  } catch (const std::exception& error) {
    refusal = error.what();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!refusal.empty())
    fail(ErrorCode::kDevice, "[threads] the system refused a thread for input and output (",
         refusal, ")");
  return thread;
}

}  // namespace puna
