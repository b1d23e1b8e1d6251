# What the loops share. A Makefile in a folder below sets NAME and MODEL (the link whose model the next iteration starts
# from), includes this, and says how an iteration is made:
#
#   $(1) its folder   $(2) the model it starts from   $(3) its number, from 1   $(4) the folder before; of the first: itself
#
# Each link is a run directory, so make goes on where it was stopped. Recipes name files from the root of the project, so
# that is where everything runs: `make -C recipes/loops/NAME` comes back here from there.

ITERATIONS ?= 2
START ?= demo/sft
OUT ?= loops/$(NAME)
HERE := recipes/loops/$(NAME)
COMMON := recipes/loops/common
RLHF ?= .venv/bin/rlhf
PYTHON ?= .venv/bin/python
NUMBERS := $(shell seq $(ITERATIONS))
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := all
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: all clean

ifeq ($(wildcard recipes/loops),)
all clean:
	@$(MAKE) --no-print-directory -C ../../.. -f $(HERE)/Makefile $@
else
all: ## every iteration, then a table of what each model is worth
	@$(MAKE) --no-print-directory demo/sft/DONE demo/rm/DONE
	@if $(MAKE) -q --no-print-directory -f $(HERE)/Makefile $(OUT)/table.md; \
		then cat $(OUT)/table.md; echo "$(NAME) is up to date"; \
		else $(MAKE) --no-print-directory -f $(HERE)/Makefile $(OUT)/table.md; fi

clean: ## remove what the loop has made
	rm -rf $(OUT)
endif

# What a model is worth: the true reward of its completions of held-out prompts. $(1) the folder, $(2) the model
define judgement
$(1)/held-out/DONE: $(COMMON)/held-out.yaml $(2)/DONE
	$(RLHF) sample $$< model=$(2) -o $$(@D)
	@touch $$@

$(1)/judged/DONE: $(COMMON)/judged.yaml $(1)/held-out/DONE
	$(RLHF) score $$< model=$(2) data.completions=$(1)/held-out -o $$(@D)
	@touch $$@
endef

# $(1) the number of an iteration -> the model that it starts from, and the folder before it
before = $(if $(filter 1,$(1)),$(START),$(OUT)/$(shell expr $(1) - 1)/$(MODEL))
former = $(OUT)/$(if $(filter 1,$(1)),1,$(shell expr $(1) - 1))

# Called by each Makefile once `iteration` is defined.
define loop
$(call judgement,$(OUT)/0,$(START))
$(foreach i,$(NUMBERS),$(call iteration,$(OUT)/$(i),$(call before,$(i)),$(i),$(call former,$(i)))$(newline)$(newline)$(call \
	judgement,$(OUT)/$(i),$(OUT)/$(i)/$(MODEL))$(newline)$(newline))
$(OUT)/table.md: $(foreach i,0 $(NUMBERS),$(OUT)/$(i)/judged/DONE) scripts/loop_table.py
	$(PYTHON) scripts/loop_table.py $(OUT) --out $$@
endef

comma := ,
empty :=
space := $(empty) $(empty)

define newline


endef
