{# The key of corpus.redaction: lowercase hex SHA-256 of the UTF-8 text. #}
{% macro sha256_of(text) -%}
    encode(sha256(convert_to({{ text }}, 'UTF8')), 'hex')
{%- endmacro %}


{#
  The redaction of `text` under the policy in force; null when there is none. An empty text needs none.
  A subquery and not a join: one look-up by key for each text. Postgres takes 100 elements for every jsonb array
  and then prefers to read all redactions for each interaction.
#}
{% macro redacted(text) -%}
    case
        when {{ text }} = '' then ''
        else (
            select redaction.redacted
            from {{ ref('stg_corpus__redactions') }} as redaction
            where redaction.text_sha256 = {{ sha256_of(text) }}
        )
    end
{%- endmacro %}


{# Text with every run of white space made one space and none at its ends. #}
{% macro squeezed(text) -%}
    btrim(regexp_replace({{ text }}, '\s+', ' ', 'g'))
{%- endmacro %}
