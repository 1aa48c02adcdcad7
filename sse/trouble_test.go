package sse

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Reads fail and succeed in turn. That is logged once in a while, and so is its end.
func TestTrouble_isSaidOnceInAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := &Hub{log: slog.New(slog.NewTextHandler(&log, nil)), ctx: context.Background()}
		said := func(text string) int { return strings.Count(log.String(), text) }
		for range 600 { // a minute
			h.found(errors.New("no"))
			h.found(nil)
			time.Sleep(100 * time.Millisecond)
		}
		if bad, well := said("cannot be read"), said("is back"); bad != 2 || well != 0 {
			t.Errorf("it was said %d times, and %d times that it is over", bad, well)
		}
		time.Sleep(troubleOver)
		h.found(nil)
		h.found(nil)
		if well := said("is back"); well != 1 {
			t.Errorf("it was said %d times that it is over", well)
		}
		warned := 0
		for range 1000 {
			if h.trouble.gap() == slog.LevelWarn {
				warned++
			}
			time.Sleep(60 * time.Millisecond)
		}
		if warned != 2*gapsMost {
			t.Errorf("%d gaps were said in a minute", warned)
		}
	})
}
