// A thread for input and output: never on compute lanes, and without the application's signals.
#pragma once

#include <functional>
#include <thread>

namespace puna {

// Throws DeviceError if the system refuses it.
std::thread start_io_thread(std::function<void()> body);

}  // namespace puna
