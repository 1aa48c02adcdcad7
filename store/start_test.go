package store_test

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// If Redis cannot be used at the start, one line says so. It names the address and the remedy.
func TestStart_aRedisThatCannotBeUsedIsOneLineWithTheRemedy(t *testing.T) {
	t.Parallel()
	r := storetest.Redis(t)
	if err := r.Do(t.Context(), "CONFIG", "SET", "requirepass", "other").Err(); err != nil {
		t.Fatal(err)
	}
	page := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(page.Close)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	away := fmt.Sprint("127.0.0.1:", storetest.FreePort(t))
	for name, c := range map[string]struct{ url, at, code, remedy string }{
		"nothing listens":           {"redis://:s3same@" + away, away, store.RedisAway, "start Redis there"},
		"no master by its Sentinel": {"redis+sentinel://:s3same@" + away + "/m", away, store.RedisAway, "start Redis there"},
		"no server of its Cluster":  {"redis+cluster://:s3same@" + away, away, store.RedisAway, "start Redis there"},
		"the name does not resolve": {"redis://:s3same@nowhere.invalid:6379", "nowhere.invalid:6379", store.RedisAway, "correct the host"},
		"a wrong password":          {"redis://:s3same@" + r.Addr(), r.Addr(), store.RedisDenied, "the user and the password"},
		"no password":               {"redis://" + r.Addr(), r.Addr(), store.RedisDenied, "wants a password"},
		"TLS to one that is silent": {"rediss://:s3same@" + silent.Addr().String(), silent.Addr().String(), store.RedisAway, "rediss://"},
		"TLS to a web server":       {"rediss://:s3same@" + page.Listener.Addr().String(), page.Listener.Addr().String(), store.RedisAway, "rediss://"},
		"a web server":              {"redis://:s3same@" + page.Listener.Addr().String(), page.Listener.Addr().String(), store.RedisAway, "not Redis"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log lines
			s := open(t, func(cfg *store.Config) { cfg.Redis, cfg.Logger, cfg.Timeout = c.url, log.logger(), time.Second })
			eventually(t, "it is logged", func() bool { return strings.Contains(log.String(), "level=ERROR") })
			eventually(t, "the subscriber has tried, too", func() bool { return c.code == store.RedisDenied || value(t, s, "gapless_pubsub_lost_total", "") >= 2 })
			if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "code="+c.code) || !strings.Contains(got, "redis="+c.at) ||
				!strings.Contains(got, c.remedy) || strings.Contains(got, "s3same") {
				t.Errorf("the log:\n%s", got)
			}
		})
	}
}

func TestStart_theLineIsRepeatedEvery30SecondsUntilRedisIsThere(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"LOADING Redis is loading the dataset in memory", "WRONGPASS invalid username-password pair"} {
		synctest.Test(t, func(t *testing.T) {
			var log lines
			refused, answered := store.Refuses("db:6379", store.Config{Logger: log.logger()})
			for range 100 {
				refused(text)
				time.Sleep(time.Second)
			}
			if got := log.String(); strings.Count(got, "\n") != 4 || strings.Count(got, "level=ERROR") != 4 {
				t.Errorf("the log of 100 s:\n%s", got)
			}
			before := len(log.String())
			for range 100 {
				answered()
				time.Sleep(time.Second)
			}
			if got := log.String()[before:]; strings.Count(got, "\n") != 1 || !strings.Contains(got, "redis is there now") || !strings.Contains(got, "db:6379") {
				t.Errorf("the log of its return:\n%s", got)
			}
		})
	}
}
