# The tree as an installed package sees it: qcompile/{passes,backends,kernels} beside the rest.
# Type checkers read it, and a development environment can import from it through a .pth file.
.PHONY: links
links:
	@mkdir -p build/types/qcompile
	@find build/types/qcompile -xtype l -delete
	@for entry in qcompile/* passes backends kernels; do \
	  link=build/types/qcompile/$$(basename $$entry); \
	  [ -L $$link ] || ln -s "$(CURDIR)/$$entry" $$link; \
	done
