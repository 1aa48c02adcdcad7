package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Schemes of Config.Redis. With rediss in front, each is over TLS.
const (
	schemeSingle   = "redis"
	schemeSentinel = "redis+sentinel"
	schemeCluster  = "redis+cluster"
)

const urlForms = "redis://[user:password@]host:port[/db], redis+sentinel://[user:password@]host:port,…/master[/db] " +
	"or redis+cluster://[user:password@]host:port,…; rediss… for TLS; or " + Embedded

// parseRedis reads Config.Redis, and the files that TLS needs.
func parseRedis(c Config) (*redis.UniversalOptions, error) {
	u, err := url.Parse(c.Redis)
	if err != nil {
		// The text may hold a password: url.Error would repeat it.
		if bad, ok := errors.AsType[*url.Error](err); ok {
			err = bad.Err
		}
		return nil, fmt.Errorf("-redis: %w: it is %s", err, urlForms)
	}
	o := &redis.UniversalOptions{Addrs: strings.Split(u.Host, ",")}
	scheme, secure := u.Scheme, strings.HasPrefix(u.Scheme, "rediss")
	if secure {
		scheme = "redis" + strings.TrimPrefix(scheme, "rediss")
		if o.TLSConfig, err = c.tls(); err != nil {
			return nil, err
		}
	} else if c.RedisCA != "" || c.RedisCert != "" {
		return nil, errors.New("-redis-ca and -redis-cert are for rediss:// URLs")
	}
	if scheme != schemeSingle && scheme != schemeSentinel && scheme != schemeCluster {
		return nil, fmt.Errorf("-redis: there is no scheme %q: it is %s", u.Scheme, urlForms)
	}
	if u.Host == "" {
		return nil, fmt.Errorf("-redis: there is no host in it: it is %s", urlForms)
	}
	for i, addr := range o.Addrs {
		if host, port, _ := strings.Cut(addr, ":"); port == "" && !strings.Contains(addr, "]") {
			o.Addrs[i] = host + ":" + map[bool]string{true: "26379", false: "6379"}[scheme == schemeSentinel]
		}
	}
	o.Username = u.User.Username()
	o.Password, _ = u.User.Password()
	path := strings.FieldsFunc(u.Path, func(r rune) bool { return r == '/' })
	query := u.Query()
	switch scheme {
	case schemeSingle:
		if len(o.Addrs) > 1 {
			return nil, fmt.Errorf("-redis: %s:// has one host: several are of redis+sentinel:// or redis+cluster://", u.Scheme)
		}
	case schemeSentinel:
		if len(path) == 0 {
			return nil, fmt.Errorf("-redis: %s:// names the master in its path: it is %s", u.Scheme, urlForms)
		}
		o.MasterName, path = path[0], path[1:]
		o.SentinelUsername, o.SentinelPassword = query.Get("sentinel_username"), query.Get("sentinel_password")
		query.Del("sentinel_username")
		query.Del("sentinel_password")
	case schemeCluster:
		o.IsClusterMode = true
	}
	if db := query.Get("db"); db != "" {
		path = append(path, db)
		query.Del("db")
	}
	if len(path) > 0 {
		if o.DB, err = strconv.Atoi(path[0]); err != nil || o.DB < 0 || len(path) > 1 || o.IsClusterMode {
			return nil, fmt.Errorf("-redis: %q is no number of a database: it is %s", strings.Join(path, "/"), urlForms)
		}
	}
	if text := query.Get("pool_size"); text != "" {
		if o.PoolSize, err = strconv.Atoi(text); err != nil || o.PoolSize < 1 {
			return nil, fmt.Errorf("-redis: pool_size is a number of connections, not %q", text)
		}
		query.Del("pool_size")
	}
	for name := range query {
		return nil, fmt.Errorf("-redis: there is no parameter %q", name)
	}
	return o, nil
}

// tls is the configuration of TLS: the server's name is verified, always.
func (c Config) tls() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.RedisCA != "" {
		pem, err := os.ReadFile(c.RedisCA)
		if err != nil {
			return nil, fmt.Errorf("-redis-ca: %w", err)
		}
		if t.RootCAs = x509.NewCertPool(); !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("-redis-ca: %s holds no certificate in PEM form", c.RedisCA)
		}
	}
	if c.RedisCert != "" || c.RedisKey != "" {
		pair, err := tls.LoadX509KeyPair(c.RedisCert, c.RedisKey)
		if err != nil {
			return nil, fmt.Errorf("-redis-cert, -redis-key: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// connect makes the client. It does not wait for Redis.
func connect(c Config, o *redis.UniversalOptions) redis.UniversalClient {
	o.Dialer = c.Dial
	// Nothing is repeated behind our back: an append that is sent twice is stored twice.
	// (In a cluster, what keeps a command from it is once.)
	o.MaxRetries = -1
	o.DialerRetries = 1
	o.DialTimeout = 2 * time.Second
	o.ReadTimeout = c.Timeout
	o.WriteTimeout = c.Timeout
	o.ContextTimeoutEnabled = true
	o.Protocol = 2 // Pub/Sub is received by our own loop, which needs nothing of RESP3
	o.DisableIdentity = true
	o.MaintNotificationsConfig = noMaintNotifications
	switch {
	case o.IsClusterMode:
		cluster := o.Cluster()
		cluster.MaxRedirects = 8 // while a slot moves
		return redis.NewClusterClient(cluster)
	case o.MasterName != "":
		return redis.NewFailoverClient(o.Failover())
	}
	return redis.NewClient(o.Simple())
}

// master is the client of the server that has a session.
func (s *Store) master(ctx context.Context, key string) (*redis.Client, error) {
	switch rdb := s.rdb.(type) {
	case *redis.ClusterClient:
		return rdb.MasterForKey(ctx, key)
	case *redis.Client:
		return rdb, nil
	}
	return nil, fmt.Errorf("a client of type %T has no master", s.rdb)
}
