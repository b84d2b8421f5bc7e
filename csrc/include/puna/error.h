// Public: what the engine throws.
#pragma once

#include "base/error.h"
