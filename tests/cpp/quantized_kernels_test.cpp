// The quantised products of every instruction set this machine can run: the bits of the plain form,
// whatever the shape and the rows beside.
#include "quantized_checks.h"

namespace {

template <class Body>
void for_fast_isas(Body body) {
  for (const puna::KernelTable* isa : puna::compiled_isas()) {
    if (isa->supported()) body(puna::resolve_isa(isa->isa));
  }
}

TEST(quantized_products_have_the_bits_of_the_plain_form) {
  for_fast_isas([](const puna::KernelTable& table) { quantized_checks::check_products(table, 6); });
}
TEST(quantized_rows_are_independent) {
  for_fast_isas([](const puna::KernelTable& table) {
    quantized_checks::check_rows_are_independent(table, 6);
  });
}
TEST(quantized_activations_are_those_of_the_plain_form) {
  for_fast_isas(
      [](const puna::KernelTable& table) { quantized_checks::check_quantizing(table, 2000); });
}

}  // namespace
