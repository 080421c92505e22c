{#
  One bound ('low' or 'high') of the Wilson 95 % score interval of successes / n (SQL expressions).
  Null when n is below the variable min_n: too few to say anything.
#}
{% macro wilson_interval(successes, n, bound) -%}
    {%- set z = 1.959963984540054 -%}
    case when {{ n }} >= {{ [var('min_n') | int, 1] | max }} then
        (
            {{ successes }}::double precision / {{ n }} + {{ z * z }} / (2 * {{ n }})
            {{ '-' if bound == 'low' else '+' }} {{ z }} * sqrt(
                ({{ successes }}::double precision / {{ n }})
                * (1 - {{ successes }}::double precision / {{ n }}) / {{ n }}
                + {{ z * z }} / (4.0 * {{ n }} * {{ n }})
            )
        ) / (1 + {{ z * z }} / {{ n }})
    end
{%- endmacro %}


{# successes / n; null when n is below the variable min_n. #}
{% macro rate(successes, n) -%}
    case when {{ n }} >= {{ [var('min_n') | int, 1] | max }} then {{ successes }}::double precision / {{ n }} end
{%- endmacro %}
