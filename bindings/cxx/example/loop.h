#pragma once

namespace example {
// Runs the loop over five layers of made-up tensors and checks every result; throws if one is wrong.
void run_loop();
}  // namespace example
