// Package size reads and writes numbers of bytes, such as 64KiB, in flags.
package size

import (
	"flag"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"
)

// Var declares a flag for a number of bytes.
func Var(fs *flag.FlagSet, p *int, name, usage string) { fs.Var((*bytes)(p), name, usage) }

type bytes int

func (b *bytes) String() string {
	return strings.ReplaceAll(humanize.IBytes(uint64(max(*b, 0))), " ", "")
}

func (b *bytes) Set(text string) error {
	n, err := humanize.ParseBytes(text)
	if err != nil || n > 1<<40 {
		return fmt.Errorf("must be a number with KiB, MiB or GiB, up to 1024GiB")
	}
	*b = bytes(n)
	return nil
}
